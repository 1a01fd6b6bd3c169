"""The settings of a run as every logger takes them: one flat mapping, with the final metrics where runs are sorted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import TensorBoardLogger

from mm_lightning.study.runner import leaves

__all__ = ["finish_loggers", "flat_settings", "log_final", "log_settings", "method_of", "run_title"]

_OF_HYDRA = ("_partial_", "_convert_")
_WATCHING = ("callbacks", "diagnostics", "logger")


def flat_settings(config: Mapping[str, Any], git_revision: str | None) -> dict[str, Any]:
    """Return each value of a resolved configuration by its dotted key, and what tells runs apart.

    Args:
        config: The resolved configuration.
        git_revision: Of the source, or None.

    Returns:
        Beside the configuration: ``method`` (see :func:`method_of`), ``layers``, ``git_revision``; of lists and null
        the text. What only watches is left out, and paths below the run's folder, which differ in every run.
    """
    folder, mixup = str(config["run_dir"]), config.get("mixup") or {}
    settings = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in leaves(dict(config)).items()
        if key.split(".")[0] not in _WATCHING and not key.endswith(_OF_HYDRA) and folder not in str(value)
    }
    layers = mixup.get("layers")
    told_apart = {"method": method_of(mixup), "layers": str(layers), "git_revision": str(git_revision)}
    return {**told_apart, "run_dir": folder, **settings}


def method_of(mixup: Mapping[str, Any]) -> str:
    """Return what mixes: ``none``, ``input``, ``manifold``, or another option that was chosen as ``mixup=NAME``."""
    if not mixup or "_target_" not in mixup:
        return "none"
    chosen = HydraConfig.get().runtime.choices.get("mixup") if HydraConfig.initialized() else None
    if chosen not in (None, "none", "input", "manifold"):
        return str(chosen)
    return "input" if mixup.get("layers") in ("input", ["input"]) else "manifold"


def run_title(config: Mapping[str, Any]) -> str:
    """Return what pictures of a run are told apart by: ``manifold mixup, alpha 1, seed 0``."""
    mixup = config.get("mixup") or {}
    method = method_of(mixup)
    alpha = "" if method == "none" or mixup.get("alpha") is None else f", alpha {mixup['alpha']:g}"
    name = {"none": "no mixup", "input": "input mixup", "manifold": "manifold mixup"}.get(method, method)
    return f"{name}{alpha}, seed {config['seed']}"


def log_settings(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Hand the settings to every logger when the run begins, but to TensorBoard, which :func:`log_final` does."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings))


def log_final(trainer: pl.Trainer, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Hand settings and final metrics to TensorBoard's HPARAMS tab; other loggers have both by now.

    Args:
        trainer: Of the run.
        settings: Of :func:`flat_settings`.
        metrics: Of the last validation and of the test; those of training, which are of one batch, are left out.
    """
    final = {key: value for key, value in metrics.items() if not key.lower().startswith(("train", "mixup/"))}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and final:
            # Lightning's logger takes no step before 2.5: the points of the final values stand at step 0 then.
            takes_step = "step" in inspect.signature(logger.log_hyperparams).parameters
            step = {"step": trainer.global_step} if takes_step else {}
            logger.log_hyperparams(dict(settings), final, **step)
        logger.save()


def finish_loggers(trainer: pl.Trainer) -> None:
    """End the run at Weights & Biases, which would go on with it in the next run of a sweep in this process."""
    for logger in trainer.loggers:
        if type(logger).__name__ == "WandbLogger" and trainer.is_global_zero:
            logger.experiment.finish()  # type: ignore[attr-defined]
