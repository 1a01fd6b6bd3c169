"""A test of a trained model, and what is written about it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mm_lightning.command.checks import check_config, check_devices
from mm_lightning.command.ending import line_of
from mm_lightning.command.loading import load
from mm_lightning.command.model import fitted_to_data
from mm_lightning.command.run_folder import environment
from mm_lightning.command.train import computing_fast, quieten

__all__ = ["Evaluation", "tested"]


@dataclass(frozen=True)
class Evaluation:
    """A test.

    Attributes:
        checkpoint: Of the model.
        folder: Of its run.
        overrides: By which the data or the trainer differ from the run's.
        data: Configuration of the data.
        metrics: What was logged.
        is_global_zero: Whether this process is the one that speaks.
    """

    checkpoint: Path
    folder: Path
    overrides: list[str]
    data: dict[str, Any]
    metrics: dict[str, float]
    is_global_zero: bool

    def content(self) -> dict[str, Any]:
        """Return what is written."""
        names = {"checkpoint": str(self.checkpoint), "overrides": self.overrides, "data": self.data}
        return {**names, "metrics": self.metrics, **environment()}

    def line(self) -> str:
        """Return the numbers in a line."""
        return line_of(self.metrics) or "nothing was logged"


def tested(checkpoint: Path, folder: Path, config: DictConfig, overrides: Sequence[str]) -> Evaluation:
    """Test a checkpoint.

    Args:
        checkpoint: In the folder of its run.
        folder: Of the run.
        config: Resolved configuration, of which data, trainer, seed and ``fast_cpu`` are read.
        overrides: By which it differs from the run's.

    Raises:
        ValueError: If a value is none that is possible, or the model is not of the data's classes and shape, or knows
            no test.
        TypeError: If a value is of another type than its target takes.
    """
    quieten()
    check_config(config)
    check_devices(config)
    pl.seed_everything(config.seed, workers=True)
    model: Any = load(checkpoint)
    data: pl.LightningDataModule = instantiate(config.data)
    fitted_to_data(config, data, "The model is trained for it; name data that are alike.")
    if type(model).test_step is pl.LightningModule.test_step:
        raise ValueError(f"{type(model).__name__} has no test_step, so there is nothing that could be measured.")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer: pl.Trainer = instantiate(config.trainer, **quiet)
    with computing_fast(trainer) if config.get("fast_cpu") else nullcontext():
        trainer.test(model, data, verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    plain: Any = OmegaConf.to_container(config.data, resolve=True)
    return Evaluation(checkpoint, folder, list(overrides), plain, metrics, trainer.is_global_zero)
