"""Trained modules back from the folder of their run, and tested again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

import mm_lightning
from mm_lightning import MixableModule
from mm_lightning.command import checks
from mm_lightning.command.evaluate import evaluate, main, with_overrides
from mm_lightning.command.loading import load, load_weights, weights_of
from mm_lightning.data import SpiralsDataModule
from mm_lightning.models import mlp_blocks

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]

MakeTrainer = Callable[..., pl.Trainer]
DATA = {"_target_": "mm_lightning.data.SpiralsDataModule", "num_points": 100, "noise": 0.1, "batch_size": 20, "seed": 1}
BLOCKS = {"_target_": "mm_lightning.models.mlp_blocks", "sizes": [2, 8, 2], "mix_before": [1]}
TRAINER = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": 1, "enable_model_summary": False}


def module(width: int = 8) -> MixableModule:
    return MixableModule(mlp_blocks([2, width, 2], [1]))


@pytest.fixture
def run(make_trainer: MakeTrainer, tmp_path: Path) -> Path:
    """A run's folder as the command leaves it; the best checkpoint is of the first epoch, the last of the second."""
    folder = tmp_path / "run"
    model, data = module(), SpiralsDataModule(num_points=100, noise=0.1, batch_size=20, seed=1)
    for epochs, name in ((1, "best"), (2, "last")):
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(model, data)
        trainer.save_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
    config = {"seed": 1, "run_dir": str(folder), "fast_cpu": False, "max_epochs": 2, "data": DATA}
    config |= {"model": {"_target_": "mm_lightning.MixableModule", "blocks": BLOCKS}}
    OmegaConf.save({**config, "trainer": {**TRAINER, "default_root_dir": str(folder)}}, folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("place", "checkpoint"),
    [(".", "best"), ("checkpoints/last.ckpt", "last"), ("checkpoints/best.ckpt", "best")],
    ids=["folder", "last", "best"],
)
def test_a_run_is_loaded_ready_to_predict(place: str, checkpoint: str, run: Path) -> None:
    before = torch.random.get_rng_state()
    loaded = mm_lightning.load(run / place)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = module()
    content = torch.load(run / "checkpoints" / f"{checkpoint}.ckpt", weights_only=True)
    expected.load_state_dict(content["state_dict"])
    inputs = torch.randn(5, 2)
    assert not any(each.training for each in loaded.modules())
    assert_close(loaded(inputs), expected.eval()(inputs), rtol=0, atol=0)


def test_without_a_best_the_last_is_loaded(run: Path) -> None:
    (run / "checkpoints" / "best.ckpt").unlink()
    assert_close(load(run).state_dict(), weights_of(run / "checkpoints" / "last.ckpt"), rtol=0, atol=0)
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "epoch=1.ckpt")
    assert_close(load(run).state_dict(), weights_of(run / "checkpoints" / "epoch=1.ckpt"), rtol=0, atol=0)


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    for place, message in (
        (tmp_path / "gone", "is neither the folder of a run nor a checkpoint in one"),
        (tmp_path, r"holds no config\.yaml, so no run"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load(place)
    lone = tmp_path / "a" / "b" / "lone.ckpt"
    lone.parent.mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").rename(lone)
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml of its run"):
        load(lone)
    (run / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load(run)


def test_weights_alone_are_read(tmp_path: Path) -> None:
    theirs, ours = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    load_weights(ours, tmp_path / "weights.pt")
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.save(theirs, tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("text")
    for name in ("object.pt", "text.pt"):
        with pytest.raises(ValueError, match="cannot be read: it is no whole checkpoint, or holds objects other than"):
            load_weights(ours, tmp_path / name)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        load_weights(ours, tmp_path / "other.pt")


def test_weights_of_another_model_are_refused_by_the_names_of_tensors(run: Path) -> None:
    other = module(width=4)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"are of another model: 'blocks\.0\.1\.weight' is \(8, 2\) there and \(4, 2\) here"
    ):
        load_weights(other, run)
    assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_lightnings_own_way_to_load_names_this_one(run: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    with pytest.raises(TypeError, match=r"cannot be built from .*: .*'blocks' is not in it.*mm_lightning\.load\("):
        MixableModule.load_from_checkpoint(path)
    loaded = MixableModule.load_from_checkpoint(path, blocks=mlp_blocks([2, 8, 2], [1]))
    assert_close(loaded.state_dict(), weights_of(path), rtol=0, atol=0)


# --- tested again


def numbers(run: Path, make_trainer: MakeTrainer, checkpoint: str, **data: Any) -> dict[str, float]:
    model = module()
    model.load_state_dict(weights_of(run / "checkpoints" / f"{checkpoint}.ckpt"))
    settings = {"num_points": 100, "noise": 0.1, "batch_size": 20, "seed": 1, **data}
    (found,) = make_trainer().test(model, SpiralsDataModule(**settings), verbose=False)
    return dict(found)


def test_a_run_is_tested_on_its_own_data_and_on_other(run: Path, make_trainer: MakeTrainer) -> None:
    assert evaluate(run).metrics == numbers(run, make_trainer, "best")
    last = run / "checkpoints" / "last.ckpt"
    assert evaluate(last, ["data.noise=0.5"]).metrics == numbers(run, make_trainer, "last", noise=0.5)


def test_an_option_replaces_the_data_of_the_run(run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    changed = with_overrides(config, ["data=mnist", "data.limit=50"])
    mnist = "mm_lightning.data.MNISTDataModule"
    assert changed.data == {"_target_": mnist, "root": None, "batch_size": 100, "seed": 1, "limit": 50}
    assert changed.trainer == config.trainer
    assert config.data == DATA


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=mlp", "'model=mlp' overrides model. mm-evaluate takes overrides of data and trainer"),
        ("data.nose=1", r"There is no 'data\.nose'\. Names there: num_points, noise, "),
    ],
)
def test_other_overrides_are_refused(override: str, message: str, run: Path) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(run, [override])


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("trainer=gpu", ValueError, r"trainer\.accelerator is 'gpu', but torch .* Choose trainer=cpu, or install"),
        (
            "data._target_=mm_lightning.data.SpiralDataModule",
            ValueError,
            r"Did you mean 'mm_lightning\.data\.SpiralsDataModule'",
        ),
        ("+trainer.deterministic=maybe", TypeError, r"trainer\.deterministic must be true or false .* got 'maybe'"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused_as_in_training(
    override: str, error: type[Exception], message: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for accelerator in (checks.CUDAAccelerator, checks.MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        evaluate(run, [override])


def test_data_that_the_model_is_not_trained_for_are_refused(run: Path) -> None:
    config: Any = OmegaConf.load(run / "config.yaml")
    config.model.blocks.update(input_shape=[2], num_classes=2)  # as the command records them
    OmegaConf.save(config, run / "config.yaml")
    message = (
        r"model\.blocks\.input_shape is \[2\], but that of the data \(MNISTDataModule\) is \[1, 28, 28\]\. "
        "The model is trained for it; name data that are alike"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(run, ["data=mnist"])


def test_the_command_prints_the_numbers_and_writes_them_beside(
    run: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.json").write_text("its own")
    expected = numbers(run, make_trainer, "best")
    for name in ("evaluation.json", "evaluation_2.json"):
        monkeypatch.setattr(sys, "argv", ["mm-evaluate", str(run), "data.noise=0.1"])
        capsys.readouterr()
        main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"Checkpoint   {run / 'checkpoints' / 'best.ckpt'}"
        assert f"acc {expected['test/acc']:.4f}" in lines[1]
        assert lines[2] == "Scores"
        assert f"Numbers      {run / name}" in lines
        content = json.loads((run / name).read_text())
        assert content["metrics"] == expected
        assert content["overrides"] == ["data.noise=0.1"]
    assert (run / "metrics.json").read_text() == "its own"
