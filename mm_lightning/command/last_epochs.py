"""Test numbers of the last epochs, for runs in which no epoch is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl

from mm_lightning.arguments import check_count

__all__ = ["LastEpochs"]  # of conf/callbacks/last_epochs.yaml


class LastEpochs(pl.Callback):
    """Adds to a test the medians of its metrics over the last epochs.

    It is for runs whose validation sees the test images, as with ``data.num_validation=0``: there each epoch has its
    test accuracy, and the best of them would be chosen by what it is then judged by. The last one is chosen by nothing,
    and neither is the median of the last ten. In other runs it adds nothing.

    ==================== ===========================================================================================
    key                  meaning
    ==================== ===========================================================================================
    test/acc_median10    median of ``val/acc`` after the last 10 epochs with a validation; the number is how many
    ==================== ===========================================================================================

    Args:
        num_epochs: How many of the last, >= 1.
        metrics: What of ``val/...`` is kept.

    Raises:
        TypeError: If ``num_epochs`` is no integer.
        ValueError: If it is below 1; and after an epoch, if its validation has logged no such metric.
    """

    def __init__(self, num_epochs: int = 10, metrics: Sequence[str] = ("acc", "nll")) -> None:
        check_count("num_epochs", num_epochs, 1, "10 is usual.")
        self.num_epochs, self.metrics = int(num_epochs), tuple(metrics)
        self._by_epoch: dict[int, list[float]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._by_epoch = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the validation of an epoch has logged."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not _validates_on_test(trainer):
            return
        logged = trainer.callback_metrics
        if missing := [metric for metric in self.metrics if f"val/{metric}" not in logged]:
            there = ", ".join(sorted(logged)) or "nothing"
            raise ValueError(f"LastEpochs keeps 'val/{missing[0]}', which is not logged. Logged are {there}.")
        self._by_epoch[trainer.current_epoch] = [float(logged[f"val/{metric}"]) for metric in self.metrics]
        self._by_epoch = dict(sorted(self._by_epoch.items())[-self.num_epochs :])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the medians beside the test's own numbers."""
        if not (self._by_epoch and _validates_on_test(trainer)):
            return
        for metric, values in zip(self.metrics, zip(*self._by_epoch.values(), strict=True), strict=True):
            # every process has the same; sync_dist says so to Lightning
            pl_module.log(f"test/{metric}_median{len(values)}", median(values), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"by_epoch": {str(epoch): values for epoch, values in self._by_epoch.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what the epochs before have logged."""
        self._by_epoch = {int(epoch): list(values) for epoch, values in state_dict["by_epoch"].items()}


def _validates_on_test(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer.datamodule, "validates_on_test", False))  # type: ignore[attr-defined]
