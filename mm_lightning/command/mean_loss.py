"""The loss that is shown while training: the mean over the epoch's batches so far, not that of one batch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

__all__ = ["MeanLoss"]

_LOSSES = ({"train", "loss"}, {"training", "loss"}, {"loss"})


class MeanLoss:
    """Sums up what the training steps of an epoch return."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """An epoch begins."""
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, trainer: pl.Trainer, outputs: Any) -> None:
        """One batch is over; of a step that returns no loss, as with manual optimization, there is none to add."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it by the number of batches in an optimizer step.
            self._sum = self._sum + loss.detach() * trainer.accumulate_grad_batches
            self._count += 1

    def shown(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``metrics`` with the mean in place of one batch's ``train/loss``, ``train_loss`` or ``loss``."""
        if not self._count:
            return dict(metrics)
        return {key: float(self._sum) / self._count if _is_loss(key) else value for key, value in metrics.items()}


def _is_loss(key: str) -> bool:
    words = set(re.split(r"[^a-z]+", key.lower())) - {"step", ""}
    return words in _LOSSES
