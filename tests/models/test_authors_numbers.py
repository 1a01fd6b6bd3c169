"""A training step of the paper's network in numbers: its loss, and the length of its gradient.

The numbers stand here as they were computed, in float64, by ``_reference_step`` below, which is written from the paper
and the code of its authors with functions of tensors alone: convolutions, means, an exponential. Weights and images are
sines, so that no generator has a part in them. The authors' own network and loss, given the same weights, ``lam`` and
partners, gave the same numbers within 4e-14. ``python tests/models/test_authors_numbers.py`` prints them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import FixedRatio, ManifoldMixupCallback
from mm_lightning.losses import SoftmaxBCE
from mm_lightning.models import classifier, preact_resnet18

LAM = 0.375  # exact in binary
PARTNER = [2, 4, 0, 3, 1]
TARGETS = [3, 1, 4, 1, 9]
WIDTH, CLASSES = 2, 10

# layer, loss: what the step minimises, and the Euclidean norm of its gradient by all parameters
NUMBERS = {
    (None, "cross_entropy"): (2.1556827004713215, 5.891318545483436),
    (None, "bce_softmax"): (0.30849099324848694, 0.6735049050401768),
    (0, "cross_entropy"): (2.177262801229456, 3.255743839182868),
    (0, "bce_softmax"): (0.31113052262342306, 0.37981542387138284),
    (1, "cross_entropy"): (2.1519451284556212, 4.749404938318601),
    (1, "bce_softmax"): (0.30820606940323453, 0.5543736682877419),
    (2, "cross_entropy"): (2.1596474822670504, 4.340949459444562),
    (2, "bce_softmax"): (0.3089711872781758, 0.5060632047833583),
}


def images() -> Tensor:
    """(5, 3, 32, 32)."""
    return torch.arange(5 * 3 * 32 * 32, dtype=torch.float64).mul(0.7).cos().view(5, 3, 32, 32)


def weights() -> dict[str, Tensor]:
    """Of each part of the network: sines of one running number, as large as a random start would be."""
    count = itertools.count()

    def sines(*shape: int) -> Tensor:
        numbers = [float(next(count)) for _ in range(int(np.prod(shape)))]
        return torch.tensor(numbers, dtype=torch.float64).sin().view(shape)

    def convolution(a: int, b: int, size: int) -> Tensor:
        return sines(b, a, size, size) * (2 / (a * size * size)) ** 0.5

    found = {"conv1": convolution(3, WIDTH, 3)}
    for stage in range(1, 5):
        for block in range(2):
            b = WIDTH * 2 ** (stage - 1)
            a = b // 2 if stage > 1 and block == 0 else b
            name = f"layer{stage}.{block}"
            found |= {f"{name}.bn1.weight": 1 + sines(a) / 2, f"{name}.bn1.bias": sines(a) / 2}
            found[f"{name}.conv1"] = convolution(a, b, 3)
            found |= {f"{name}.bn2.weight": 1 + sines(b) / 2, f"{name}.bn2.bias": sines(b) / 2}
            found[f"{name}.conv2"] = convolution(b, b, 3)
            if a != b:
                found[f"{name}.shortcut"] = convolution(a, b, 1)
    return {**found, "linear.weight": sines(CLASSES, 8 * WIDTH) / 2, "linear.bias": sines(CLASSES) / 2}


def _reference_step(layer: int | None, loss: str) -> tuple[float, float]:
    """The step with layer k mixed, 0 the input and k the end of the k-th stage; None mixes none."""
    w = {name: tensor.requires_grad_() for name, tensor in weights().items()}

    def normalised(x: Tensor, name: str) -> Tensor:
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        gamma, beta = w[f"{name}.weight"][:, None, None], w[f"{name}.bias"][:, None, None]
        return (gamma * (x - mean) / (variance + 1e-5).sqrt() + beta).clamp(min=0)

    def mixed(h: Tensor) -> Tensor:
        return LAM * h + (1 - LAM) * h[PARTNER]

    h, t = images(), torch.eye(CLASSES, dtype=torch.float64)[TARGETS]
    if layer is not None:
        t = mixed(t)
    if layer == 0:
        h = mixed(h)
    h = F.conv2d(h, w["conv1"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            a = normalised(h, f"{name}.bn1")
            around = h if stride == 1 else F.conv2d(a, w[f"{name}.shortcut"], stride=stride)
            inner = F.conv2d(a, w[f"{name}.conv1"], stride=stride, padding=1)
            h = around + F.conv2d(normalised(inner, f"{name}.bn2"), w[f"{name}.conv2"], padding=1)
        if layer == stage:
            h = mixed(h)
    logits = h.mean(dim=(2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    if loss == "bce_softmax":
        value = (-t * p.log() - (1 - t) * (1 - p).log()).sum() / (len(t) * CLASSES)
    else:
        value = -(t * p.log()).sum() / len(t)
    value.backward()
    squares = [float((tensor.grad**2).sum()) for tensor in w.values() if tensor.grad is not None]
    assert len(squares) == len(w)
    return value.item(), sum(squares) ** 0.5


class Partners:
    """These rows, whatever is drawn."""

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        return np.array(PARTNER)


class Step(pl.Callback):
    """Keeps the loss and the length of the gradient of the one step."""

    loss = norm = float("nan")

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in module.parameters()]
        self.norm = sum(float((gradient**2).sum()) for gradient in gradients if gradient is not None) ** 0.5
        assert None not in gradients

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.loss = outputs["loss"].item()


def network() -> nn.Module:
    """The package's, with these weights."""
    model, given = preact_resnet18(CLASSES, WIDTH).double(), weights()
    own = dict(model.named_parameters())
    for name, tensor in given.items():
        parameter = own[name if name in own else f"{name}.weight"]
        assert parameter.shape == tensor.shape
        parameter.data = tensor
    assert len(own) == len(given)
    return model


@pytest.mark.parametrize(("layer", "loss"), NUMBERS, ids=lambda value: str(value))
def test_the_numbers_are_those_of_a_plain_loop(layer: int | None, loss: str) -> None:
    assert _reference_step(layer, loss) == pytest.approx(NUMBERS[layer, loss], rel=1e-10, abs=0)


@pytest.mark.parametrize(("layer", "loss"), NUMBERS, ids=lambda value: str(value))
def test_the_callback_takes_the_authors_step(
    layer: int | None, loss: str, make_trainer: Callable[..., pl.Trainer]
) -> None:
    chosen = {"cross_entropy": nn.CrossEntropyLoss(), "bce_softmax": SoftmaxBCE()}[loss]
    module = classifier(network(), CLASSES, optimizer=lambda own: torch.optim.SGD(own, lr=0.1), loss=chosen)
    step, mixup = Step(), []
    if layer is not None:
        place = ["input", "blocks.0.layer1", "blocks.0.layer2"][layer]
        mixup = [ManifoldMixupCallback(alpha=None, ratio=FixedRatio(LAM), pairing=Partners(), layers=[place])]
    data = TensorDataset(images(), torch.tensor(TARGETS))
    make_trainer(*mixup, step).fit(module, DataLoader(data, batch_size=5))
    assert (step.loss, step.norm) == pytest.approx(NUMBERS[layer, loss], rel=1e-10, abs=0)


if __name__ == "__main__":
    for k, loss in itertools.product((None, 0, 1, 2), ("cross_entropy", "bce_softmax")):
        print(f"    ({k}, {loss!r}): {_reference_step(k, loss)},")
