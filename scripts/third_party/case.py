"""What is said of a package's LightningModule so that its mixed step can be computed by other means."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

ROWS = 7

Path = str | int | tuple[str | int, ...]
"""A key, a position or a field's name in a batch; or several, that lead further in, or none: the whole."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A LightningModule of a public package, built small, with a batch made in memory.

    Attributes:
        name: The class, as the package calls it.
        loss: How it computes its loss, in a line.
        make: Builds it; called under a fixed seed.
        batch: Builds its batch of ``ROWS`` rows, always the same.
        with_targets_of: Rebuilds a batch, given the partners (N,), so that its targets are those of the partners and
            its inputs stay. None where the inputs are a part of the targets: then the whole batch is the partners', and
            hidden states are mixed the other way round.
        layers: Where to mix: what the callback calls so.
        inputs: Paths to what of the batch ``"input"`` mixes.
        enters: Or modules whose arguments it mixes, where the batch's inputs are targets too.
        embeddings: Modules whose output it mixes: the embeddings of integers. ``("*",)`` is every ``nn.Embedding``.
        dims: Which dimension of a layer's output holds the rows, where it is not the first with as many.
        options: Further arguments of the callback.
        has_targets: Whether the loss compares with anything of the batch.
        reorder: Puts the rows of a batch into another order, where they are not what a tree of tensors shows.
    """

    name: str
    loss: str
    make: Callable[[], pl.LightningModule]
    batch: Callable[[], Any]
    with_targets_of: Callable[[Any, Tensor], Any] | None = None
    layers: tuple[str, ...] = ("auto",)
    inputs: tuple[Path, ...] = ()
    enters: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    dims: dict[str, int] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_targets: bool = True
    reorder: Callable[[Any, Tensor], Any] | None = None

    def of_partners(self, batch: Any, partner: Tensor) -> Any:
        """The batch whose targets are the partners'."""
        if self.with_targets_of is not None:
            return self.with_targets_of(batch, partner)
        return (self.reorder or rows)(batch, partner)


def reals(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal numbers, float32, (ROWS, *shape)."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def integers(below: int, *shape: int, start: int = 0, seed: int = 3) -> Tensor:
    """Integers from ``start`` up to ``below - 1``, int64, (ROWS, *shape)."""
    return torch.randint(start, below, (ROWS, *shape), generator=torch.Generator().manual_seed(seed))


def rows(batch: Any, order: Tensor) -> Any:
    """Every tensor's rows in another order."""
    return tree_map(lambda leaf: leaf[order] if isinstance(leaf, Tensor) and len(leaf) == len(order) else leaf, batch)


def changed(batch: Any, paths: Iterable[Path], change: Callable[[Any], Any]) -> Any:
    """Apply a function to what a batch has at some paths."""
    for path in paths:
        if path == ():
            return change(batch)
        first, *rest = path if isinstance(path, tuple) else (path,)
        is_field = hasattr(batch, "_fields") or not isinstance(batch, (dict, list, tuple))
        old = getattr(batch, str(first)) if is_field else batch[first]
        new = changed(old, [tuple(rest)], change) if rest else change(old)
        if hasattr(batch, "_fields"):
            batch = batch._replace(**{str(first): new})
        elif isinstance(batch, dict):
            batch = {**batch, first: new}
        elif isinstance(batch, (list, tuple)):
            batch = type(batch)([new if place == first else item for place, item in enumerate(batch)])
        else:
            batch = copy.copy(batch)
            object.__setattr__(batch, str(first), new)
    return batch


def targets(*paths: Path) -> Callable[[Any, Tensor], Any]:
    """Take what a batch has at some paths from the partners, and leave the rest."""
    return lambda batch, partner: changed(batch, paths, lambda value: rows(value, partner))


def without_dropout(module: Any) -> Any:
    """Switch dropout off, where the reference's two runs would draw it for different rows: before the mixed layer."""
    for part in module.modules():
        if isinstance(part, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)):
            part.p = 0.0
        elif isinstance(part, (nn.RNNBase, nn.MultiheadAttention)):
            part.dropout = 0.0
    return module


def with_sgd(module: Any) -> Any:
    """Leave schedules alone that wait for a validation."""
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    return module
