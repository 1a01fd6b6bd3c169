"""WideResNet against its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning.models import WideResNet


def _number_of_parameters(depth: int, widen: int, num_classes: int) -> int:
    """By hand: 9 ab for a 3x3 convolution of a to b channels, ab for the shortcut, 2a for a normalisation."""
    total, a = 9 * 3 * 16, 16
    for b in (16 * widen, 32 * widen, 64 * widen):
        total += 2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if a != b else 0)  # first block
        total += ((depth - 4) // 6 - 1) * 2 * (2 * b + 9 * b * b)
        a = b
    return total + 2 * a + (a + 1) * num_classes


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 2), (28, 10)])
def test_number_of_parameters(depth: int, widen: int) -> None:
    with torch.device("meta"):
        assert _size(WideResNet(depth, widen, num_classes=7)) == _number_of_parameters(depth, widen, 7)


def test_wrn_28_10_has_thirty_six_and_a_half_million_parameters() -> None:
    # table 4 of Zagoruyko & Komodakis (2016) says 36.5 million
    with torch.device("meta"):
        assert _size(WideResNet()) == _number_of_parameters(28, 10, 10) == 36_479_194


def test_depth_counts_the_convolutions() -> None:
    with torch.device("meta"):
        model = WideResNet(28, 2)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 28
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [4, 4, 4]


@pytest.mark.parametrize("stride", [1, 2])
def test_shapes_are_those_of_the_docstring(stride: int) -> None:
    size = 32 * stride
    model = WideResNet(depth=10, widen=2, num_classes=7, stride=stride)
    hidden, shapes = torch.zeros(2, 3, size, size), []
    for module in (model.conv1, model.layer1, model.layer2, model.layer3):
        hidden = module(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_logits_are_the_linear_layer_of_the_mean_of_what_is_activated() -> None:
    model = WideResNet(depth=10, widen=1).double().eval()
    generator = torch.Generator().manual_seed(4)
    for tensor in (model.bn.weight, model.bn.bias, model.bn.running_mean, model.bn.running_var):
        tensor.data = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    seen: list[Tensor] = []
    model.layer3.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64))
    mean, variance = (tensor[:, None, None] for tensor in (model.bn.running_mean, model.bn.running_var))
    gamma, beta = (parameter[:, None, None] for parameter in (model.bn.weight, model.bn.bias))
    activated = (gamma * (seen[0] - mean) / (variance + 1e-5).sqrt() + beta).clamp(min=0)
    pooled = F.avg_pool2d(activated, 8).flatten(1)  # as the source writes it, for 32x32 images
    torch.testing.assert_close(logits, pooled @ model.linear.weight.T + model.linear.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"depth": 18}, ValueError, r"depth must be 6 n \+ 4 for a whole n >= 1, got 18\. 28 is the papers'"),
        ({"depth": 4}, ValueError, r"depth must be 6 n \+ 4 for a whole n >= 1, got 4\."),
        ({"depth": 28.0}, TypeError, "depth must be .*, got 28.0 of type float"),
        ({"widen": 0}, ValueError, r"widen must be an integer >= 1, got 0\."),
        ({"stride": 0}, ValueError, r"stride must be an integer >= 1, got 0\."),
        ({"num_classes": None}, TypeError, "num_classes must be an integer >= 1, got None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WideResNet(**settings)
