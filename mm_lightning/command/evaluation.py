"""A test of a trained model, and what is written about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mm_lightning.command.checks import check_config, check_devices
from mm_lightning.command.ending import line_of
from mm_lightning.command.loading import load
from mm_lightning.command.metric_names import is_of_regression
from mm_lightning.command.model import fitted_to_data
from mm_lightning.command.run_folder import environment
from mm_lightning.command.train import computing_fast, quieten
from mm_lightning.diagnostics.evaluation import Evaluation

__all__ = ["Tested", "tested"]


@dataclass(frozen=True)
class Tested:
    """A test.

    Attributes:
        checkpoint: Of the model.
        folder: Of its run.
        overrides: By which the data or the trainer differ from the run's.
        data: Configuration of the data.
        metrics: What the module's own test has logged.
        evaluation: What was measured besides.
        is_global_zero: Whether this process is the one that speaks.
        remarks: Of what was left out, beside those of ``evaluation``.
    """

    checkpoint: Path
    folder: Path
    overrides: list[str]
    data: dict[str, Any]
    metrics: dict[str, float]
    evaluation: Evaluation
    is_global_zero: bool
    remarks: list[str] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """Return what is written."""
        names = {"checkpoint": str(self.checkpoint), "overrides": self.overrides, "data": self.data}
        return {**names, "metrics": self.metrics, "evaluation": self._measured(), **environment()}

    def line(self) -> str:
        """Return the numbers of the module's own test in a line."""
        return line_of(self.metrics) or "nothing was logged"

    def left_out(self) -> list[str]:
        """Return why something is missing or uncertain, a line each."""
        return [*self.remarks, *self.evaluation.remarks]

    def _measured(self) -> dict[str, Any]:
        found, fitted = self.evaluation, self.evaluation.fitted
        temperature = None if fitted is None else {**fitted._asdict(), "is_uncertain": fitted.is_uncertain}
        numbers = {"scores": found.scores.get("plain", {}), "scores_scaled": found.scores.get("scaled", {})}
        return {
            **numbers,
            "temperature": temperature,
            **found.groups,
            "settings": found.settings,
            "remarks": self.left_out(),
        }


def tested(
    checkpoint: Path,
    folder: Path,
    config: DictConfig,
    overrides: Sequence[str],
    settings: Mapping[str, Any] | None,
    own_data: DictConfig | None,
) -> Tested:
    """Test a checkpoint.

    Args:
        checkpoint: In the folder of its run.
        folder: Of the run.
        config: Resolved configuration, of which data, trainer, seed and ``fast_cpu`` are read.
        overrides: By which it differs from the run's.
        settings: Of :class:`mm_lightning.diagnostics.Evaluation`.
        own_data: Configuration of the run's own data, where others are tested on: training and validation data, of
            which temperature, bounds and neighbours are, are always the run's own.

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
    remarks: list[str] = []
    own = None if own_data is None else _of_the_run(own_data, remarks)
    evaluation = Evaluation(**{"data": own, "seed": config.seed, **(settings or {})})
    evaluation.is_quiet = True
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=[evaluation], **quiet)
    with computing_fast(trainer) if config.get("fast_cpu") else nullcontext():
        trainer.test(model, data, verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    own_metrics = {key: value for key, value in metrics.items() if not key.startswith(f"test/{evaluation.name}/")}
    if evaluation.scores and is_of_regression(own_metrics):
        remarks.append(
            "the module's own test is that of a regression. If it is one, the scores say nothing: they are of the last "
            "integers in its batches."
        )
    plain: Any = OmegaConf.to_container(config.data, resolve=True)
    is_first = trainer.is_global_zero
    return Tested(checkpoint, folder, list(overrides), plain, own_metrics, evaluation, is_first, remarks)


def _of_the_run(own_data: DictConfig, remarks: list[str]) -> Any:
    """The run's own data, or something without loaders where they are gone."""
    try:
        own = instantiate(own_data)
        own.setup("fit")
        own.setup("validate")
    except Exception as error:  # whatever data say that are not there any more
        cause = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        remarks.append(f"the run's own data cannot be had, of which temperature, bounds and neighbours are: {cause}.")
        return object()
    return own
