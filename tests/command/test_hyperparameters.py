"""Settings and final metrics in the loggers."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from mm_lightning.command.hyperparameters import (
    finish_loggers,
    flat_settings,
    log_final,
    log_settings,
    method_of,
    run_title,
)

MIXUP = {"_target_": "mm_lightning.ManifoldMixupCallback", "alpha": 0.5, "layers": ["input", "first"]}
CONFIG = {
    "seed": 3,
    "alpha": 0.5,
    "run_dir": "/runs/a",
    "ckpt_path": None,
    "mixup": MIXUP,
    "trainer": {"max_epochs": 2, "default_root_dir": "/runs/a"},
    "optimizer": {"_partial_": True, "lr": 0.1},
    "diagnostics": {"hidden_space": {"dirpath": "/runs/a/figures", "every_n_epochs": 2}},
}
SETTINGS = {
    "method": "manifold",
    "layers": "['input', 'first']",
    "git_revision": "abc",
    "run_dir": "/runs/a",
    "seed": 3,
    "alpha": 0.5,
    "ckpt_path": "None",
    "mixup._target_": "mm_lightning.ManifoldMixupCallback",
    "mixup.alpha": 0.5,
    "mixup.layers": "['input', 'first']",
    "trainer.max_epochs": 2,
    "optimizer.lr": 0.1,
}
METRICS = {"val/acc": 0.75, "test/acc": 0.5, "train/loss": 1.0, "mixup/lam": 0.3}


def test_settings_are_flat_and_say_method_layers_and_revision() -> None:
    assert flat_settings(CONFIG, "abc") == SETTINGS


@pytest.mark.parametrize(
    ("mixup", "method"),
    [
        ({}, "none"),
        (MIXUP, "manifold"),
        ({**MIXUP, "layers": "input"}, "input"),
        ({**MIXUP, "layers": ["input"]}, "input"),
    ],
)
def test_method_is_what_is_mixed(mixup: dict[str, Any], method: str) -> None:
    assert method_of(mixup) == method


@pytest.mark.parametrize(
    ("mixup", "title"),
    [
        ({}, "no mixup, seed 3"),
        (MIXUP, "manifold mixup, alpha 0.5, seed 3"),
        ({**MIXUP, "layers": "input", "alpha": 2.0}, "input mixup, alpha 2, seed 3"),
    ],
)
def test_pictures_name_method_alpha_and_seed(mixup: dict[str, Any], title: str) -> None:
    assert run_title({**CONFIG, "mixup": mixup}) == title


MakeTrainer = Callable[..., pl.Trainer]


def log_all(make_trainer: MakeTrainer, *loggers: Any) -> None:
    trainer = make_trainer(logger=list(loggers))
    log_settings(trainer, SETTINGS)
    for logger in loggers:
        logger.log_metrics({"val/acc": 0.25}, step=0)
    log_final(trainer, SETTINGS, METRICS)
    finish_loggers(trainer)


def hparams_of(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the HPARAMS tab reads from the event files: the settings of the run, and the metrics it may sort by."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent("hparams").items()
    }
    start = found["_hparams_/session_start_info"].session_start_info.hparams
    values = {key: getattr(value, str(value.WhichOneof("kind"))) for key, value in start.items()}
    metrics = [info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos]
    return values, sorted(metrics)


def test_tensorboard_sorts_runs_by_their_settings(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    log_all(make_trainer, TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False))
    values, metrics = hparams_of(tmp_path / "tb")
    assert values == SETTINGS
    assert metrics == ["test/acc", "val/acc"]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [events.Scalars(key)[-1].value for key in metrics] == [0.5, 0.75]


def test_csv_holds_the_settings_beside_the_curves(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    log_all(make_trainer, CSVLogger(tmp_path, name="", version="csv"))
    assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text()) == SETTINGS
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert [row["val/acc"] for row in csv.DictReader(file)] == ["0.25"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs the extra wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_holds_the_settings_offline(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("first", "second"):  # the second run of a sweep in one process is a run of its own
        logger = WandbLogger(project="mine", name=name, save_dir=tmp_path)
        log_all(make_trainer, logger)
    runs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    for run in runs:
        assert all(word in run.read_bytes() for word in (b"mixup.alpha", b"git_revision", b"val/acc"))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="needs the extra mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_sorts_runs_by_their_settings(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = MLFlowLogger("mine", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    log_all(make_trainer, logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params == {key: str(value) for key, value in SETTINGS.items()}
    assert run.data.metrics == {"val/acc": 0.25}
