"""What a run's validations have measured, epoch by epoch, in a file."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from mm_lightning.files import write_json

__all__ = ["ValidationCurve"]  # of conf/callbacks/study.yaml


class ValidationCurve(pl.Callback):
    """Writes ``{"validations": [{"epoch": 1, "metrics": {...}}, ...]}`` when training ends.

    The metrics are what was logged by the end of a validation.

    Args:
        path: Of the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._points: list[dict[str, object]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what is logged."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self._points.append({"epoch": trainer.current_epoch + 1, "metrics": metrics})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            write_json(self.path, {"validations": self._points})
