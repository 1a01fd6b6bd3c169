"""One training of scripts/unreproduced.py: its settings, and the numbers that are left of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from mm_lightning import ManifoldMixupCallback, MixableModule, Until
from mm_lightning.data import MNISTDataModule, SpiralsDataModule
from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.evaluation.spectrum import class_spectrum
from mm_lightning.models import mlp_blocks

Splits = dict[str, tuple[Tensor, Tensor]]  # inputs (N, D) and targets (N,) of "train" and "test"

ROWS = (3, 5, 7, 10, 20, 50, 100, 500)  # images of each class that singular values are taken of
SPIRAL_ROWS = (10, 20, 50, 100, 150, 200, 300, 500, 1000, 1500)  # and points
NUMBERS = ("largest", "others", "others_squared", "largest_centred", "others_centred", "others_squared_centred")
NARROW = 64  # units; dropout leaves out layers that are as narrow


@dataclass(frozen=True)
class Settings:
    """What one training is made of.

    Args:
        sizes: Units of each layer, from the inputs to the logits.
        mix_before: Blocks that batches are mixed before, 0 is the input; empty is no mixup.
        inputs: A key of INPUTS: the scale of MNIST. Spirals are left as they are.
        images: Training images, the first of MNIST.
        init: A key of INITIAL.
        slope: Of the LeakyReLU below zero.
        dropout: Share of the units of each layer but the narrow ones.
        loss: A key of LOSSES.
        optimizer: A key of OPTIMIZERS.
        lr: Learning rate at the start.
        schedule: A key of SCHEDULES.
        epochs: Of training.
        batch: Rows per step.
        reshuffled: Whether batches are drawn anew in each epoch.
        weight_decay: In the gradient.
        alpha: ``lam ~ Beta(alpha, alpha)``.
        per_sample: Whether each row has a ``lam`` of its own.
        until: Share of training after which nothing is mixed.
        noise: Of the spirals.
        turns: Of the spirals that are kept, from the middle; 780 / 360 is all.
    """

    sizes: tuple[int, ...] = (784, 256, 256, 256, 12, 256, 256, 256, 256, 10)
    mix_before: tuple[int, ...] = ()
    inputs: str = "[0, 1]"
    images: int = 10_000
    init: str = "Glorot"
    slope: float = 0.3
    dropout: float = 0.0
    loss: str = "cross-entropy"
    optimizer: str = "Adam"
    lr: float = 1e-3
    schedule: str = "cosine"
    epochs: int = 10
    batch: int = 100
    reshuffled: bool = True
    weight_decay: float = 0.0
    alpha: float = 2.0
    per_sample: bool = False
    until: float = 1.0
    noise: float = 0.9
    turns: float = 780 / 360

    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults, as JSON has them."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def of(cls, changed: Mapping[str, Any]) -> Settings:
        """The settings that ``changed`` returned these of."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()})


def standardised(images: Tensor) -> Tensor:
    """Every pixel with mean 0 and deviation 1 over the training images; one that never varies is 0."""
    train = mnist()["train"][0]
    deviation = train.std(dim=0)
    return torch.where(deviation > 0, (images - train.mean(dim=0)) / deviation.clamp(min=1e-8), 0.0)


def bce_of_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each class's probability, as in the authors' code."""
    return F.binary_cross_entropy(logits.softmax(dim=1), F.one_hot(targets, logits.shape[1]).to(logits.dtype))


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[0, 1]": lambda images: images,
    "[-1, 1]": lambda images: 2 * images - 1,
    "normalised": lambda images: (images - 0.1307) / 0.3081,  # mean and deviation of all pixels
    "standardised": standardised,
    "[0, 255]": lambda images: 255 * images,
}
INITIAL: dict[str, Callable[[nn.Linear, float], None]] = {
    "Glorot": lambda layer, slope: None,  # mlp_blocks has done so
    "PyTorch": lambda layer, slope: layer.reset_parameters(),
    "He": lambda layer, slope: _he(layer, slope),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": F.cross_entropy, "BCE": bce_of_softmax}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": partial(torch.optim.Adam, fused=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9, fused=True),
}
SCHEDULES: dict[str, Callable[[int], Callable[..., Any]]] = {
    "cosine": lambda epochs: partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
    "constant": lambda epochs: partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
    "step": lambda epochs: partial(torch.optim.lr_scheduler.StepLR, step_size=max(1, round(epochs / 2.4)), gamma=0.1),
}


def _he(layer: nn.Linear, slope: float) -> None:
    nn.init.kaiming_uniform_(layer.weight, a=slope)
    nn.init.zeros_(layer.bias)


@cache
def mnist() -> Splits:
    """MNIST in [0, 1], (N, 784): 50,000 images to train and 10,000 to test."""
    splits = MNISTDataModule().load_splits()
    return {name: (images.flatten(1), targets) for name, (images, targets) in splits.items()}


def spirals(noise: float, turns: float, seed: int) -> Splits:
    """The points of the seed's spirals that lie within so many turns of the arms.

    The noise moves some of the outermost points beyond the end of the arms: they are left out, 2 % of all.
    """
    splits = SpiralsDataModule(noise=noise, seed=seed).load_splits()
    kept = {name: points.norm(dim=1) <= 2 * math.pi * turns for name, (points, _) in splits.items()}
    return {name: (points[kept[name]], targets[kept[name]]) for name, (points, targets) in splits.items()}


def data_of(settings: Settings, seed: int) -> Splits:
    """What is trained on and tested with."""
    if settings.sizes[0] == 2:
        return spirals(settings.noise, settings.turns, seed)
    scale, splits = INPUTS[settings.inputs], mnist()
    train, test = splits["train"], splits["test"]
    return {
        "train": (scale(train[0][: settings.images]), train[1][: settings.images]),
        "test": (scale(test[0]), test[1]),
    }


def fit(settings: Settings, seed: int, data: Splits) -> MixableModule:
    """Train a network."""
    pl.seed_everything(seed)
    shares = [settings.dropout if units > NARROW else 0.0 for units in settings.sizes[1:-1]]
    blocks = mlp_blocks(settings.sizes, settings.mix_before, settings.slope, shares)
    for block, _ in blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                INITIAL[settings.init](layer, settings.slope)
    optimizer = partial(OPTIMIZERS[settings.optimizer], lr=settings.lr, weight_decay=settings.weight_decay)
    module = MixableModule(blocks, LOSSES[settings.loss], optimizer, SCHEDULES[settings.schedule](settings.epochs))
    callbacks = []
    if settings.mix_before:
        schedule = Until(settings.until) if settings.until < 1 else None
        callbacks = [
            ManifoldMixupCallback(settings.alpha, per_sample=settings.per_sample, seed=seed, schedule=schedule)
        ]
    inputs, targets = data["train"]
    sampler: Any = DistributedSampler(range(len(inputs)), 1, 0, shuffle=settings.reshuffled, seed=seed)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=settings.epochs,
        accelerator="cpu",
        callbacks=callbacks,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(module, TensorBatches((inputs, targets), settings.batch, sampler))  # type: ignore[arg-type]
    return module.eval()


@torch.no_grad()
def numbers_of(module: MixableModule, data: Splits, rows: Sequence[int] = ROWS) -> dict[str, Any]:
    """Accuracies, and the singular values of the first ``rows`` training rows of each class in each hidden layer.

    Layer 1 is the first hidden one; "1 linear" is before its activation. Of layers past the narrowest there is nothing,
    and none of a network whose training has diverged.
    """
    found: dict[str, Any] = {}
    for name, (inputs, targets) in data.items():
        logits = module(inputs[:10_000])
        found[f"{name}_acc"] = _short((logits.argmax(dim=1) == targets[:10_000]).double().mean())
        found[f"{name}_nll"] = _short(F.cross_entropy(logits, targets[:10_000]))
    if not math.isfinite(found["train_nll"]):
        return {**found, "spectra": {}}
    inputs, targets = data["train"]
    places = [(targets == k).nonzero()[: max(rows), 0] for k in targets.unique()]
    enough = [n for n in rows if n <= min(len(own) for own in places)]
    found["spectra"] = {
        layer: {
            str(n): _spectrum_numbers(torch.cat([hidden[i * max(enough) :][:n] for i in range(len(places))]), n)
            for n in enough
        }
        for layer, hidden in _hidden(module, inputs[torch.cat([own[: max(enough)] for own in places])]).items()
    }
    return found


def _hidden(module: MixableModule, inputs: Tensor) -> dict[str, Tensor]:
    widths = [layer.out_features for layer in module.blocks.modules() if isinstance(layer, nn.Linear)]
    last = widths.index(min(widths[:-1]))
    found = {}
    for i, block in enumerate(module.blocks[: last + 1], start=1):  # type: ignore[arg-type]
        for layer in block.children():
            inputs = layer(inputs)
            if isinstance(layer, nn.Linear) and i - 1 in (0, last):
                found[f"{i} linear"] = inputs
        found[str(i)] = inputs
    return found


def _spectrum_numbers(hidden: Tensor, n: int) -> list[float]:
    """The NUMBERS of classes of n rows each, that follow one another; means over the classes."""
    classes = torch.arange(len(hidden) // n).repeat_interleave(n)
    found = []
    for centred in (False, True):
        values, _ = class_spectrum(hidden, classes, centred)
        found += [values[:, 0], values[:, 1:].sum(dim=1), values[:, 1:].square().sum(dim=1)]
    return [_short(value.mean()) for value in found]


def _short(number: Tensor) -> float:
    return float(f"{number.item():.5g}")


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Train a network, and return its numbers."""
    data = data_of(settings, seed)
    return numbers_of(fit(settings, seed, data), data, SPIRAL_ROWS if settings.sizes[0] == 2 else ROWS)


def record_of(settings: Settings, seed: int) -> dict[str, Any]:
    """What tells a run from the others."""
    assert Settings.of(settings.changed()) == settings, asdict(settings)
    return {"settings": settings.changed(), "seed": seed}
