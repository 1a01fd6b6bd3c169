"""What a run says when it begins: its folder, seed and device, and where its batches are mixed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mm_lightning.callback import ManifoldMixupCallback

__all__ = ["SayWhereMixed", "print_beginning", "say"]


def print_beginning(trainer: pl.Trainer, folder: Path, seed: int) -> None:
    """Print the run's folder, seed and device, on rank zero."""
    if trainer.is_global_zero:
        print(f"Run          {folder}, seed {seed}, on {_device_of(trainer)}", flush=True)


def say(trainer: pl.Trainer, text: str) -> None:
    """Print a line, on rank zero, without tearing a progress bar apart."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        (print if bar is None else bar.print)(text)
        sys.stdout.flush()


class SayWhereMixed(pl.Callback):
    """Prints the layers that are mixed when the first batch has told them; Lightning's remarks are not shown."""

    def __init__(self) -> None:
        super().__init__()
        self.has_trained = False  # a batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first batch."""
        self.has_trained = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Print once."""
        if self.has_trained:
            return
        self.has_trained = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ManifoldMixupCallback) and callback.layer_names:
                say(trainer, f"Manifold mixup mixes at {', '.join(map(repr, callback.layer_names))}.")


def _device_of(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    name = f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} processes, {name}"
