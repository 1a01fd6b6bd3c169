"""What the command has to know of its training, which only hooks tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from mm_lightning.command.run_folder import keep_folder

__all__ = ["Watch"]


class Watch(pl.Callback):
    """Lets the run's folder stay when the first step is done, and tells values of one step from those of an epoch."""

    def __init__(self) -> None:
        self._of_steps: set[str] | None = None
        self._of_validation: set[str] = set()
        self._before: set[str] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """From here on the run is one that has trained. See what single steps have logged in the first epoch."""
        keep_folder()
        if trainer.is_last_batch and self._of_steps is None:  # later, the epoch's own values are there, too
            self._of_steps = set(trainer.callback_metrics) - self._of_validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what was there before a validation."""
        self._before = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See what the validation has logged."""
        self._of_validation |= set(trainer.callback_metrics) - self._before

    def without_steps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics but for those of which only a single step's value is known."""
        steps = self._of_steps or set()
        return {key: value for key, value in metrics.items() if key not in steps or f"{key}_epoch" in metrics}
