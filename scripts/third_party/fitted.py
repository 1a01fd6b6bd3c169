"""Modules that a package builds itself, when it fits: taken from a fit of its own, with the batch that they got."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from third_party.case import without_dropout


class KeepBatch(pl.Callback):
    """Keeps the first batch that a module trains on, and the module."""

    module: Any = None
    batch: Any = None

    def __deepcopy__(self, memo: Any) -> KeepBatch:
        return self  # some packages copy their trainer

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        if self.module is None:
            self.module, self.batch = pl_module, copy.deepcopy(batch)


class Fitted:
    """Fits once, when the module or the batch is first asked for.

    Args:
        fit: Fits with a callback.
    """

    def __init__(self, fit: Callable[[KeepBatch], None]) -> None:
        self._fit = fit
        self._kept: KeepBatch | None = None

    def module(self) -> Any:
        """A copy of the module, without dropout."""
        module = self._once().module
        module.trainer = None
        return without_dropout(copy.deepcopy(module))

    def batch(self) -> Any:
        """The batch."""
        return copy.deepcopy(self._once().batch)

    def _once(self) -> KeepBatch:
        if self._kept is None:
            kept = KeepBatch()
            self._fit(kept)
            self._kept = kept
        return self._kept
