"""The best checkpoint by whatever metric of the validation a module logs, and the last one where it logs none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mm_lightning.command.beginning import say
from mm_lightning.command.metric_names import direction_of, found_metric

__all__ = ["BestCheckpoint"]  # of conf/callbacks/default.yaml

AUTO = "auto"
_WAY_OUT = "Name one with callbacks.checkpoint.monitor=KEY callbacks.checkpoint.mode=max or min."


class BestCheckpoint(ModelCheckpoint):
    """Keeps the last checkpoint, and the best one by a metric that is looked for when validation first logs it.

    Without such a metric the run goes on with the last one alone, as is said in one line.

    Args:
        monitor: Key of the metric; ``"auto"`` finds ``val/acc``, ``val_acc``, ``val_loss`` and the like, None looks for
            none.
        mode: ``"max"`` or ``"min"``; ``"auto"`` reads it from the metric's name.
        save_top_k: Number of best checkpoints.
        save_last: Whether ``last.ckpt`` is written too, after every epoch (with ``every_n_epochs``, every so many) and
            when training ends.
        settings: As ``ModelCheckpoint`` takes them.

    Raises:
        ValueError: If ``mode`` is another one, or ``"auto"`` and the name of ``monitor`` does not tell.
    """

    def __init__(
        self,
        monitor: str | None = AUTO,
        mode: str = AUTO,
        save_top_k: int = 1,
        save_last: bool = True,
        **settings: Any,
    ) -> None:
        if mode not in (AUTO, "max", "min"):
            raise ValueError(f"callbacks.checkpoint.mode must be auto, max or min, got {mode!r}.")
        if mode == AUTO and monitor not in (AUTO, None) and direction_of(monitor) is None:
            raise ValueError(
                f"callbacks.checkpoint.monitor {monitor!r} does not tell whether more or less of it is better. "
                "Say callbacks.checkpoint.mode=max or min."
            )
        # Lightning writes last.ckpt where one of the best is written, and not after the epochs in between.
        is_by_epoch = not (settings.get("every_n_train_steps") or settings.get("train_time_interval"))
        self.keeps_last = bool(save_last) and is_by_epoch
        # Until the metric is there, nothing is the best; a missing monitor would be a warning, and later an error.
        of_lightning: dict[str, Any] = {
            "save_top_k": save_top_k if monitor is None else 0,
            "save_last": save_last and not is_by_epoch,
        }
        super().__init__(monitor=None, **of_lightning, **settings)
        self.wanted, self.wanted_mode, self.wanted_top_k = monitor, mode, save_top_k
        self._is_told = False
        self._step_of_last = -1

    @property
    def state_key(self) -> str:
        """The same before and after the metric is known, so that a resumed run finds its state."""
        return type(self).__qualname__

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the metric, and save the best."""
        if not trainer.sanity_checking:
            self._look(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the metric where nothing is validated, and save the best and the last."""
        batches = trainer.num_val_batches
        if not (sum(batches) if isinstance(batches, list) else batches):
            self._look(trainer)
        super().on_train_epoch_end(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._keep_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last, if an epoch that was not to be saved was it."""
        super().on_train_end(trainer, pl_module)
        self._keep_last(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        logged = list(trainer.callback_metrics)
        if self.wanted is None or (self.monitor is not None and self.monitor in logged):
            return
        known = [key for key in logged if self.wanted_mode in (AUTO, direction_of(key))]
        self.monitor = found_metric(known) if self.wanted == AUTO else self.wanted if self.wanted in logged else None
        self.save_top_k = 0 if self.monitor is None else self.wanted_top_k
        if self.monitor is not None:
            better = (direction_of(self.monitor) or "max") if self.wanted_mode == AUTO else self.wanted_mode
            if better != self.mode and not self.best_k_models:
                self.mode, self.kth_value = better, torch.tensor(math.inf if better == "min" else -math.inf)
        elif not self._is_told:
            self._is_told = True
            say(trainer, f"Checkpoint   only the last one is kept: {self._missing(logged)} {_WAY_OUT}")

    def _keep_last(self, trainer: pl.Trainer) -> None:
        if not self.keeps_last or trainer.fast_dev_run or self._step_of_last == trainer.global_step:  # type: ignore[attr-defined]
            return
        self._step_of_last = trainer.global_step
        self.last_model_path = str(Path(self.dirpath or "", f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"))
        trainer.save_checkpoint(self.last_model_path, self.save_weights_only)

    def _missing(self, logged: list[str]) -> str:
        keys = f"logged are {', '.join(map(repr, logged))}." if logged else "nothing is logged."
        if self.wanted == AUTO:
            return f"of a validation, no metric like 'val/acc' or 'val_loss' is logged; {keys}"
        return f"callbacks.checkpoint.monitor {self.wanted!r} is not logged; {keys}"
