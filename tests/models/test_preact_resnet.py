"""PreActResNet against its formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning.models import PreActResNet, preact_resnet18, preact_resnet34


def _number_of_parameters(blocks: tuple[int, int, int, int], width: int, num_classes: int) -> int:
    """By hand: 9 ab for a 3x3 convolution of a to b channels, ab for the shortcut, 2a for a normalisation."""
    total, a = 9 * 3 * width, width
    for stage, count in enumerate(blocks):
        b = width * 2**stage
        total += 2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if stage > 0 else 0)  # first block
        total += (count - 1) * 2 * (2 * b + 9 * b * b)
        a = b
    return total + (a + 1) * num_classes


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _reference_conv3x3(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Nine 1x1 convolutions of the shifted image, with zeros around it."""
    rows, columns = x.shape[2:]
    x = F.pad(x, (1, 1, 1, 1))
    shifted = [
        torch.einsum("nchw,oc->nohw", x[:, :, i : i + rows, j : j + columns], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    ]
    return sum(shifted[1:], shifted[0])[:, :, ::stride, ::stride]


def _reference_activated(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """max(0, gamma (x - mean) / sqrt(variance + eps) + beta), mean and variance of each channel over the batch."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    gamma, beta = (parameter[:, None, None] for parameter in (norm.weight, norm.bias))
    return (gamma * (x - mean) / (variance + 1e-5).sqrt() + beta).clamp(min=0)


@pytest.mark.parametrize(
    ("build", "blocks"), [(preact_resnet18, (2, 2, 2, 2)), (preact_resnet34, (3, 4, 6, 3))], ids=["18", "34"]
)
@pytest.mark.parametrize("width", [4, 64])
def test_number_of_parameters(
    build: Callable[..., PreActResNet], blocks: tuple[int, int, int, int], width: int
) -> None:
    with torch.device("meta"):
        model = build(num_classes=7, width=width)
    assert _size(model) == _number_of_parameters(blocks, width, 7)


def test_the_standard_network_has_eleven_million_parameters() -> None:
    with torch.device("meta"):
        assert _size(preact_resnet18()) == _number_of_parameters((2, 2, 2, 2), 64, 10) == 11_171_146


def test_the_deeper_network_has_twenty_one_million_parameters() -> None:
    with torch.device("meta"):
        assert _size(preact_resnet34()) == _number_of_parameters((3, 4, 6, 3), 64, 10) == 21_279_306


@pytest.mark.parametrize("build", [preact_resnet18, preact_resnet34], ids=["18", "34"])
def test_a_stride_halves_larger_images_at_the_start(build: Callable[..., PreActResNet]) -> None:
    with torch.device("meta"):
        model = build(num_classes=7, width=4, stride=2)
        assert model.conv1(torch.zeros(2, 3, 64, 64)).shape == (2, 4, 32, 32)
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert _size(model) == _size(build(num_classes=7, width=4))


def test_shapes_are_those_of_the_docstring() -> None:
    model = preact_resnet18(num_classes=7, width=4)
    hidden, shapes = torch.zeros(2, 3, 32, 32), []
    for module in (model.conv1, model.layer1, model.layer2, model.layer3, model.layer4):
        hidden = module(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(4, 32, 32), (4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("layer", "stride"), [("layer1", 1), ("layer2", 2)], ids=["identity", "shortcut"])
def test_a_block_equals_its_formula(layer: str, stride: int) -> None:
    generator = torch.Generator().manual_seed(3)
    block = getattr(preact_resnet18(width=4).double(), layer)[0]
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.float64)
    activated = _reference_activated(x, block.bn1)
    hidden = _reference_activated(_reference_conv3x3(activated, block.conv1.weight, stride), block.bn2)
    wanted = _reference_conv3x3(hidden, block.conv2.weight, 1)
    if stride == 1:
        wanted = wanted + x
    else:
        weight = block.shortcut.weight[:, :, 0, 0]
        wanted = wanted + torch.einsum("nchw,oc->nohw", activated[:, :, ::2, ::2], weight)
    torch.testing.assert_close(block(x), wanted, rtol=0, atol=1e-10)


def test_logits_are_the_linear_layer_of_the_mean_over_space() -> None:
    model = preact_resnet18(width=4).double()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seen: list[Tensor] = []
    model.layer4.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(x)
    pooled = F.avg_pool2d(seen[0], 4).flatten(1)  # as the authors write it, for 32x32 images
    torch.testing.assert_close(logits, pooled @ model.linear.weight.T + model.linear.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"blocks": (2, 2, 2)}, ValueError, r"blocks must hold four numbers of blocks, got \[2, 2, 2\]\."),
        ({"blocks": 18}, ValueError, r"blocks must hold four numbers of blocks, got 18\."),
        ({"blocks": (2, 0, 2, 2)}, ValueError, r"blocks\[1\] must be an integer >= 1, got 0\."),
        ({"width": "wide"}, TypeError, "width must be an integer >= 1, got 'wide' of type str"),
        ({"width": 0}, ValueError, r"width must be an integer >= 1, got 0\."),
        ({"stride": 0}, ValueError, r"stride must be an integer >= 1, got 0\. 1 is for 32x32 images"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PreActResNet(**{"blocks": (2, 2, 2, 2), **settings})
