"""Ctrl-C that can be resumed from: the step in progress is finished first."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import lightning.pytorch as pl

__all__ = ["StopAfterStep"]


class StopAfterStep(pl.Callback):
    """Turns the first Ctrl-C during fit into a KeyboardInterrupt after the training step in progress.

    Python would raise it anywhere, in the middle of an optimizer step too, and a checkpoint of half-updated weights
    would not continue as the uninterrupted run does. Place it before the checkpoint callback's turn comes: Lightning
    runs checkpoint callbacks last. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._requested = False
        self._previous: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for Ctrl-C."""
        self._requested = False
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # not in the main thread, where Ctrl-C never arrives
            self._previous = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop here if asked to."""
        if self._requested:
            raise KeyboardInterrupt

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening. A request that came after the last step stops here."""
        self._stop_listening()
        if self._requested:
            raise KeyboardInterrupt

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._stop_listening()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._stop_listening()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print(
            "\nInterrupted: finishing this step, then saving a checkpoint. Ctrl-C again to stop at once.",
            file=sys.stderr,
        )

    def _stop_listening(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
