"""What a person sees while training: a bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from mm_lightning.command.mean_loss import MeanLoss

__all__ = ["EpochLines", "TerminalBar", "progress_bar"]  # the last one is of conf/


def progress_bar() -> ProgressBar:
    """Return the bar for a terminal, or lines where the output goes to a file or a pipe."""
    return TerminalBar() if sys.stderr.isatty() else EpochLines()


class TerminalBar(TQDMProgressBar):
    """Lightning's bar, with the time left for the whole run beside the epoch's."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)  # steps; drawing more often costs more than it shows
        self._clock = _Clock()
        self._mean_loss = MeanLoss()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._clock.start(trainer)
        # In the middle of an epoch, where a run is resumed, Lightning tells its bar neither the epoch nor its length.
        bar, done = self.train_progress_bar, trainer.fit_loop.batch_idx + 1
        bar.reset(None if trainer.num_training_batches == math.inf else int(trainer.num_training_batches))
        bar.initial = bar.n = done
        bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin a bar, and the mean of the loss."""
        self._mean_loss.begin()
        super().on_train_epoch_start(trainer, *_)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's loss, and move the bar."""
        self._mean_loss.add(trainer, outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the logged metrics, of the loss the mean, without the logger's version, and the time left."""
        on_bar = super().get_metrics(trainer, pl_module)
        on_bar.pop("v_num", None)
        metrics = self._mean_loss.shown(_told(trainer, on_bar))
        return {**metrics, "left": self._clock.left(trainer)} if trainer.training else metrics


class EpochLines(ProgressBar):
    """Prints one line at the end of every epoch: epoch, mean loss, validation accuracy, time left."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()
        self._mean_loss = MeanLoss()
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

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the mean of the loss."""
        self._mean_loss.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Add the batch's loss."""
        self._mean_loss.add(trainer, outputs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's line."""
        if not self._enabled:
            return
        logged = self._mean_loss.shown(_told(trainer, trainer.progress_bar_metrics))
        shown = {key: float(value) for key, value in logged.items()}
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        epoch = f"epoch {trainer.current_epoch + 1:3d}{of}"
        print(f"{epoch}  {metrics}  left {self._clock.left(trainer)}", flush=True)


def _told(trainer: pl.Trainer, on_bar: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the module has logged for the bar; where that is nothing, all that it has logged."""
    return on_bar or {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("mixup/")}


class _Clock:
    """Time left, from the share of the run's batches done since the start (or the resumption) of training."""

    def start(self, trainer: pl.Trainer) -> None:
        self._begin = time.monotonic()
        self._done_before = _batches_done(trainer)

    def left(self, trainer: pl.Trainer) -> str:
        done, total = _batches_done(trainer), _batches_in_all(trainer)
        if total == math.inf or done <= self._done_before:
            return "?"
        seconds = (time.monotonic() - self._begin) / (done - self._done_before) * max(total - done, 0.0)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _batches_done(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.total_batch_idx + 1


def _batches_in_all(trainer: pl.Trainer) -> float:
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    return min(epochs * trainer.num_training_batches, steps * trainer.accumulate_grad_batches)
