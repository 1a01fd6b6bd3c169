"""The example of a project of one's own, as its README says it is used."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import hydra
import lightning.pytorch as pl
import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig
from own_process import run_module

from mm_lightning.command.configuration import CONF
from mm_lightning.command.model import build_model, fitted_to_data

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_project"

pytestmark = pytest.mark.skipif(not EXAMPLE.is_dir(), reason="needs the source tree")


def commands() -> list[list[str]]:
    lines = re.findall(r"^python -m (.*?)(?:\s+#.*)?$", (EXAMPLE / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", [*overrides, f"hydra.searchpath=[file://{EXAMPLE / 'conf'}]", "run_dir=here"])


@pytest.mark.parametrize("overrides", [command[3:] for command in commands()], ids=" ".join)
def test_each_command_composes_a_model_for_its_data(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    config = composed(*(text.split(",")[0] for text in overrides if text != "-m"))
    data = instantiate(config.data)
    fitted = fitted_to_data(config, data)
    data.setup("fit")
    points, targets = next(iter(data.train_dataloader()))
    assert (points.shape, targets.max()) == ((50, 2), 2)
    assert build_model(fitted)(points).shape == (50, 3)


def test_the_command_sets_up_its_optimizer_for_the_module(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    config = composed("+experiment=rings", "data.num_points=200", "max_epochs=2")
    data = instantiate(config.data)
    callback = instantiate(config.mixup)
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(build_model(fitted_to_data(config, data)), data)
    assert set(callback.layer_names) == {"input", "encoder", "hidden"}
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.01
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)  # half a cosine, over


@pytest.mark.slow
def test_the_first_command_trains(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "project"))
    more = ["max_epochs=5", "trainer.log_every_n_steps=5"]
    done = run_module(*commands()[0], *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "outputs" / "rings").iterdir()
    assert json.loads((run / "metrics.json").read_text())["metrics"]["test_acc"] > 0.9
    assert "num_classes: 3" in (run / "config.yaml").read_text().split("model:")[1]
    assert (run / "checkpoints" / "best.ckpt").is_file()
