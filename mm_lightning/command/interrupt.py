"""Ctrl-C that can be resumed from: the step in progress is finished first, then a checkpoint is saved."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from mm_lightning.command.line import typed
from mm_lightning.command.run_folder import keep_folder
from mm_lightning.namespaces import CallbackOfBoth, LightningModule, Trainer, classes

__all__ = ["StopAfterStep"]  # of conf/callbacks/default.yaml

_SIGTERM = classes("utilities.exceptions.SIGTERMException")


class StopAfterStep(CallbackOfBoth):
    """Turns the first Ctrl-C during fit into a KeyboardInterrupt after the training step in progress, and saves there.

    Python would raise it anywhere, in the middle of an optimizer step too, and a checkpoint of half-updated weights
    would not continue as the uninterrupted run does. A second Ctrl-C stops at once and saves nothing. SIGTERM, which
    Lightning answers between two steps, saves as well.

    Args:
        path: The checkpoint to write.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._requested = False
        self._is_between_steps = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for Ctrl-C. Not before: Lightning puts back the handlers of the moment just before training."""
        self._requested = self._is_between_steps = False
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # not in the main thread, where Ctrl-C never arrives
            self._previous = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop here if asked to, on all processes after the same step."""
        if trainer.world_size > 1:
            self._requested = trainer.strategy.reduce_boolean_decision(self._requested, all=False)
        self._stop_if_requested()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening. A request that came after the last step stops here."""
        self._stop_if_requested()
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where a resumed run can continue, and stop listening."""
        is_terminated = (
            isinstance(exception, classes("utilities.exceptions.SIGTERMException"))
            and trainer.state.fn == TrainerFn.FITTING
        )
        if self._is_between_steps or is_terminated:
            self._is_between_steps = False
            trainer.save_checkpoint(self.path)
            keep_folder()
            if trainer.is_global_zero:
                again = typed("ckpt_path", str(self.path))
                print(f"Saved {self.path}. To go on, repeat the command with {again}", file=sys.stderr)
        self._stop_listening()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._stop_listening()

    def _stop_if_requested(self) -> None:
        if self._requested:
            self._is_between_steps = True
            raise KeyboardInterrupt

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
