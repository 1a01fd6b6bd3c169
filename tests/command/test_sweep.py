"""Sweeps by Hydra's launchers and sweepers, where their packages are installed, and what a sweeper is told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import hydra
import pytest
import yaml
from own_process import run_module

from mm_lightning.command.configuration import CONF
from mm_lightning.command.objective import objective_of

PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit": "hydra_plugins.hydra_submitit_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}
BRIEF = ["model.blocks.sizes=[784,8,10]", "trainer=smoke", "data.limit=600", "logger=none", "hydra.sweep.dir=sweep"]


def needs(option: str) -> pytest.MarkDecorator:
    package = PLUGINS[option]
    is_there = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(package)
    return pytest.mark.skipif(not is_there, reason=f"needs {package.split('.')[1]}, of the extra sweep")


def sweep(cwd: Path, *overrides: str) -> str:
    done = run_module("mm_lightning.train", "-m", *BRIEF, *overrides, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seeds_of(folder: Path) -> list[int]:
    return sorted(json.loads(path.read_text())["seed"] for path in folder.glob("sweep/*/metrics.json"))


def test_every_option_has_its_package_named() -> None:
    assert {path.stem for path in (CONF / "sweep").glob("*.yaml")} == set(PLUGINS)


@pytest.mark.parametrize("option", [pytest.param(option, marks=needs(option)) for option in PLUGINS])
def test_option_composes(option: str, tmp_path: Path) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [f"+sweep={option}", f"run_dir={tmp_path}"], return_hydra_config=True)
    parts = (config.hydra.launcher._target_, config.hydra.sweeper._target_)
    assert any(PLUGINS[option] in target for target in parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [pytest.param(option, marks=needs(option)) for option in ("joblib", "submitit_local")]
)
def test_runs_of_a_launcher_leave_their_folders(option: str, tmp_path: Path) -> None:
    sweep(tmp_path, f"+sweep={option}", "seed=0,1")
    assert seeds_of(tmp_path) == [0, 1]


@pytest.mark.slow
@needs("joblib")
def test_a_refusal_in_another_process_is_one_line(tmp_path: Path) -> None:
    done = run_module("mm_lightning.train", "-m", *BRIEF, "+sweep=joblib", "mixup.alpha=-1,-2", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: mixup: alpha must be" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@needs("optuna")
@pytest.mark.filterwarnings("ignore")
def test_optuna_searches_alpha_layers_and_probability(tmp_path: Path) -> None:
    sweep(tmp_path, "+sweep=optuna", "hydra.sweeper.n_trials=2")
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert set(found["best_params"]) == {"alpha", "mixup.layers", "mixup.probability"}
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/metrics.json")]
    assert found["best_value"] == max(run["metrics"]["val/acc"] for run in runs)
    assert len(runs) == 2


def test_a_sweeper_is_told_what_is_better_the_larger_it_is() -> None:
    metrics = {"val/acc": 0.5, "val/loss": 2.0, "train/loss": 3.0}
    assert objective_of(metrics, "auto") == 0.5
    assert objective_of({"val_loss": 2.0}, "auto") == -2.0
    assert objective_of(metrics, "val/loss") == 2.0
    with pytest.raises(ValueError, match=r"objective 'val/f1' is none of .*\. These are train/loss, val/"):
        objective_of(metrics, "val/f1")
