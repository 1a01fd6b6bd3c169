"""What an entry of the zoo is, and the pieces that entries are written with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ROWS = 6

# What a refusal says, where several entries share the reason.
NOT_OF_THE_BATCH = (
    "would not mix features and targets alike: with its rows and the targets' in another order, the loss is"
)
SEVERAL_PASSES = "runs [23] times in training_step"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A LightningModule that knows nothing of mixup, and what mixup must do with it.

    Attributes:
        name: Its name in tests and in the table.
        domain: What it is used for.
        style: How it computes its loss, in one line.
        make: Builds it in float64, always with the same weights.
        batch: Builds its batch of ``ROWS`` rows, always the same.
        with_targets_of: Rebuilds a batch, given the partners (N,), so that its targets alone are those of the partners.
        layers: Names of layers to mix at, each of which is checked.
        refused: What the error says where the step must be refused; None where it must be exact.
        options: Further arguments of the callback.
        moves_inputs: The targets are inputs too, so that ``with_targets_of`` takes the whole batch from the partners.
        needs: A package that the entry cannot be built without.
    """

    name: str
    domain: str
    style: str
    make: Callable[[], pl.LightningModule]
    batch: Callable[[], Any]
    with_targets_of: Callable[[Any, Tensor], Any]
    layers: tuple[str, ...]
    refused: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    moves_inputs: bool = False
    needs: str | None = None


class Module(pl.LightningModule):
    """A LightningModule with the optimizer of a first example."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seeded(build: Callable[..., pl.LightningModule], *args: Any) -> Callable[[], pl.LightningModule]:
    """Return a function that builds the module in float64, always with the same weights."""

    def make() -> pl.LightningModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return build(*args).double()

    return make


def reals(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal numbers, float64, (ROWS, *shape)."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(k: int, *shape: int, start: int = 0, seed: int = 3) -> Tensor:
    """Integers from ``start`` up to ``k - 1``, int64, (ROWS, *shape)."""
    return torch.randint(start, k, (ROWS, *shape), generator=torch.Generator().manual_seed(seed))


def targets(*keys: str | int) -> Callable[[Any, Tensor], Any]:
    """Take what a batch has at ``keys`` (positions, keys or field names) from the partners, and leave the rest."""

    def with_targets_of(batch: Any, partner: Tensor) -> Any:
        def take(key: str | int, value: Any) -> Any:
            return everything(value, partner) if key in keys else value

        if isinstance(batch, dict):
            return {key: take(key, value) for key, value in batch.items()}
        if dataclasses.is_dataclass(batch):
            fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            return type(batch)(**{key: take(key, value) for key, value in fields.items()})
        if hasattr(batch, "_fields"):
            return type(batch)(**{key: take(key, value) for key, value in batch._asdict().items()})
        return type(batch)(take(key, value) for key, value in enumerate(batch))

    return with_targets_of


def everything(batch: Any, partner: Tensor) -> Any:
    """Take the whole batch from the partners."""
    return tree_map(lambda tensor: tensor[partner], batch)
