"""What a run says when it begins: its folder, seed and device, and where its batches are mixed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mm_lightning.callback import ManifoldMixupCallback

__all__ = ["SayBeginning", "say"]


def say(trainer: pl.Trainer, text: str) -> None:
    """Print a line, on rank zero, without tearing a progress bar apart."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        (print if bar is None else bar.print)(text)
        sys.stdout.flush()


class SayBeginning(pl.Callback):
    """Prints what is trained where; Lightning's own remarks are not shown.

    The run's folder, seed and device when training starts, which is after most of what is refused; and the layers that
    are mixed when the first batch has told them.

    Args:
        folder: Of the run.
        seed: Of the run.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        self.folder, self.seed = folder, seed
        self.has_trained = False  # a batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the first line."""
        self.has_trained = False
        say(trainer, f"Run          {self.folder}, seed {self.seed}, on {_device_of(trainer)}")
        for line in _unreached(trainer):
            say(trainer, line)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Print once."""
        if self.has_trained:
            return
        self.has_trained = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ManifoldMixupCallback) and callback.layer_names:
                say(trainer, f"Manifold mixup mixes at {', '.join(map(repr, callback.layer_names))}.")


def _unreached(trainer: pl.Trainer) -> Iterator[str]:
    """A line for each schedule of milestones that a shorter run, by ``max_epochs``, comes to none of."""
    epochs = trainer.max_epochs or 0
    for config in trainer.lr_scheduler_configs:
        milestones = sorted(getattr(config.scheduler, "milestones", ()))
        if config.interval == "epoch" and milestones and 3 < epochs <= milestones[0]:
            yield (
                f"The learning rate stays as it is: none of its milestones {milestones} comes before the end of "
                f"{epochs} epochs. scheduler.milestones=[{epochs // 2},{3 * epochs // 4}] divides it on the way."
            )


def _device_of(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    name = f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} processes, {name}"
