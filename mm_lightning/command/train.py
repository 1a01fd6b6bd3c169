"""The main command: ``python -m mm_lightning.train +experiment=mnist_bottleneck``.

Composes the configuration, trains, tests, and leaves a folder with everything about the run.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from mm_lightning.callback import ManifoldMixupCallback
from mm_lightning.command.beginning import SayBeginning, say
from mm_lightning.command.checkpoint import check_checkpoint
from mm_lightning.command.checks import check_config, check_devices
from mm_lightning.command.ending import ending
from mm_lightning.command.hyperparameters import (
    finish_loggers,
    flat_settings,
    log_final,
    log_settings,
    method_of,
    run_title,
)
from mm_lightning.command.loading import load_weights
from mm_lightning.command.model import build_model, fitted_to_data, record
from mm_lightning.command.objective import check_may_choose
from mm_lightning.command.run_folder import claim_folder, environment, keep_composition, keep_folder
from mm_lightning.command.said import keep_what_is_said
from mm_lightning.command.watch import Watch
from mm_lightning.fast_cpu import fast_products, keep_freed_memory
from mm_lightning.files import write_json
from mm_lightning.study.epochs import one_number_of_epochs

__all__ = ["build_trainer", "computing_fast", "quieten", "run"]


def run(config: DictConfig) -> dict[str, float]:
    """Train and test what the configuration says.

    Args:
        config: The composed configuration, as ``conf/train.yaml`` documents it.

    Returns:
        The final metrics: those of the last validation and of the test.

    Raises:
        FileExistsError: If the run's folder holds a run already.
        ValueError: If the configuration or the checkpoint to resume from does not fit.
    """
    begin = time.monotonic()
    quieten()
    folder = Path(config.run_dir)
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    one_number_of_epochs(config, overrides)
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {config.seed!r}.")
    if not isinstance(config.fast_cpu, bool):
        raise ValueError(f"fast_cpu must be true or false, got {config.fast_cpu!r}.")
    check_config(config)
    check_devices(config)
    if config.objective is not None and not str(config.objective).startswith("train"):
        check_may_choose(config.data, f"objective={config.objective} is what a search chooses by")
    rank_zero_only(claim_folder)(folder, OmegaConf.to_yaml(config, resolve=True))
    rank_zero_only(keep_composition)(folder)
    with keep_what_is_said(folder / "train.log") if getattr(rank_zero_only, "rank", 0) == 0 else nullcontext():
        return _run(config, folder, overrides, begin)


def _run(config: DictConfig, folder: Path, overrides: Sequence[str], begin: float) -> dict[str, float]:
    pl.seed_everything(config.seed, workers=True)
    data: pl.LightningDataModule = instantiate(config.data)
    config = fitted_to_data(config, data)
    rank_zero_only(record)(folder, config)
    model = build_model(config)
    if config.weights is not None:
        if config.ckpt_path is not None:
            raise ValueError(
                "weights and ckpt_path are both given. ckpt_path resumes a run with its optimizer, weights begins a "
                "new one; leave one of them out."
            )
        load_weights(model, Path(config.weights))
    is_configured = "optimizer" in config.model or "configure_optimizers" in vars(model)
    optimizer, scheduler = _optimizer_and_scheduler(config, model) if is_configured else (None, None)
    if config.ckpt_path is not None:
        check_checkpoint(Path(config.ckpt_path), model, optimizer, scheduler)
    watch, beginning = Watch(), SayBeginning(folder, config.seed)
    trainer = build_trainer(config, [watch, beginning])
    if trainer.precision == "64-true":
        model.double()  # before Lightning does it: it loads a checkpoint first, and would round it
    made_with = environment()
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    settings = flat_settings(resolved, made_with["git_revision"])
    log_settings(trainer, settings)
    metrics: dict[str, float] = {}
    try:
        with computing_fast(trainer) if config.fast_cpu else nullcontext():
            trainer.fit(model, data, ckpt_path=config.ckpt_path)
            if trainer.interrupted:  # of which lightning before 2.4 says nothing else
                raise KeyboardInterrupt
            if config.ckpt_path is not None and not beginning.has_trained:
                say(
                    trainer,
                    f"Nothing is left to train: {config.ckpt_path} is of the end. A larger max_epochs trains on.",
                )
            keep_folder()
            metrics |= watch.without_steps(_measured(trainer))
            fit_seconds = time.monotonic() - begin
            tested = _tested(trainer, model, data)
        metrics |= tested
    finally:
        log_final(trainer, settings, metrics or _measured(trainer))
        finish_loggers(trainer)

    if trainer.is_global_zero:
        seconds = {"fit_seconds": round(fit_seconds, 2), "total_seconds": round(time.monotonic() - begin, 2)}
        content = {
            "name": config.name,
            "seed": config.seed,
            "overrides": list(overrides),
            "epochs": trainer.current_epoch,
            "method": method_of(config.mixup),
            "layers": _layers_mixed(trainer),
        }
        content |= {"metrics": metrics}
        write_json(folder / "metrics.json", {**content, **seconds, **made_with})
        print(ending(folder, tested, seconds["total_seconds"]))
    return metrics


def build_trainer(config: DictConfig, extra: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Build the trainer with its logger and with the callbacks of the configuration, and ``extra`` ones after them."""
    callbacks = _instantiate_all({**config.diagnostics, **config.callbacks, "mixup": config.mixup})
    for callback in callbacks:
        if hasattr(callback, "run_title"):
            callback.run_title = run_title(config)
    loggers = {"logger": config.logger} if "_target_" in config.logger else config.logger
    logger = _instantiate_all(dict(loggers))
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=[*callbacks, *extra], logger=logger)
    return trainer


def _optimizer_and_scheduler(config: DictConfig, model: pl.LightningModule) -> tuple[Any, Any]:
    """Make what the model will make for itself, so that a value that they refuse is told with its group."""
    made: list[Any] = [model.parameters()]
    for group in ("optimizer", "scheduler"):
        try:
            made.append(instantiate(config[group])(made[-1]) if config.get(group) else None)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{group}: {error}") from error
    return made[1], made[2]


@contextmanager
def computing_fast(trainer: pl.Trainer) -> Iterator[None]:
    """Where the trainer computes on the CPU: matrix products by the faster library, and freed memory kept."""
    if trainer.strategy.root_device.type != "cpu":
        yield
        return
    keep_freed_memory()
    with fast_products():
        yield


def _layers_mixed(trainer: pl.Trainer) -> list[str]:
    """The layers that training could mix at, as ``layers="auto"`` has found them."""
    callbacks = [one for one in trainer.callbacks if isinstance(one, ManifoldMixupCallback)]  # type: ignore[attr-defined]
    return [name for callback in callbacks for name in callback.layer_names]


def _measured(trainer: pl.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def _tested(trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """Test, and return what was logged; nothing where the module or the data know no test."""
    for part, base, method in (
        (model, pl.LightningModule, "test_step"),
        (data, pl.LightningDataModule, "test_dataloader"),
    ):
        if getattr(type(part), method) is getattr(base, method):
            say(trainer, f"Not tested: {type(part).__name__} has no {method}.")
            return {}
    trainer.test(model, data, verbose=False)
    return _measured(trainer)


def _instantiate_all(configs: dict[str, Any]) -> list[Any]:
    """Instantiate each entry that names a target; ``none.yaml`` and null entries name none."""
    return [instantiate(entry) for entry in configs.values() if entry and "_target_" in entry]


def quieten() -> None:
    """Leave out Lightning's remarks on hardware and products; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    # A resumed run has a folder of its own, where the best checkpoint is the best since it resumed.
    warnings.filterwarnings("ignore", message="The dirpath has changed")
