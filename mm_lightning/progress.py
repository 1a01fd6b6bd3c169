"""What a person sees while training: a bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

__all__ = ["EpochLines", "TerminalBar", "progress_bar"]


def progress_bar() -> ProgressBar:
    """Return the bar for a terminal, or lines where the output goes to a file or a pipe."""
    return TerminalBar() if sys.stderr.isatty() else EpochLines()


class TerminalBar(TQDMProgressBar):
    """Lightning's bar, with the time left for the whole run beside the epoch's."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)  # steps; drawing more often costs more than it shows
        self._clock = _Clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._clock.start(trainer)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the logged metrics, without the logger's version, and the time left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**metrics, "left": self._clock.left(trainer)} if trainer.training else dict(metrics)


class EpochLines(ProgressBar):
    """Prints one line at the end of every epoch: epoch, loss, validation accuracy, time, time left."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()
        self._enabled = True

    def disable(self) -> None:
        """Print nothing from now on. Lightning calls it on all ranks but zero."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._clock.start(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's line."""
        if not self._enabled:
            return
        shown = {key: float(value) for key, value in trainer.progress_bar_metrics.items()}
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
        epoch = f"epoch {trainer.current_epoch + 1:3d}/{trainer.max_epochs}"
        print(f"{epoch}  {metrics}  left {self._clock.left(trainer, finished_epoch=True)}", flush=True)


class _Clock:
    """Time left, from the share of the run's batches done since the start (or the resumption) of training."""

    def start(self, trainer: pl.Trainer) -> None:
        self._begin = time.monotonic()
        self._done_before = self._epochs_done(trainer)

    def left(self, trainer: pl.Trainer, finished_epoch: bool = False) -> str:
        done = trainer.current_epoch + 1.0 if finished_epoch else self._epochs_done(trainer)
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        if total is None or done <= self._done_before:
            return "?"
        seconds = (time.monotonic() - self._begin) / (done - self._done_before) * max(total - done, 0.0)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    @staticmethod
    def _epochs_done(trainer: pl.Trainer) -> float:
        batches = trainer.num_training_batches
        share = trainer.fit_loop.epoch_loop.batch_progress.current.completed / batches if batches else 0.0
        return trainer.current_epoch + share
