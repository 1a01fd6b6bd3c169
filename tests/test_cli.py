"""The callback and MixableModule from a YAML file, by LightningCLI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import (
    BetaRatio,
    ChannelMix,
    FoldedRatio,
    ManifoldMixupCallback,
    MixableModule,
    NearestNeighbors,
    Roll,
    UniformRatio,
    Until,
    WarmUp,
)

# Lightning calls jsonargparse in an old way.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit.py"])


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, torch.arange(16) % 3), batch_size=8)


class Backwards:
    """A pairing of one's own."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        return (np.arange(batch_size)[::-1] + self.shift) % batch_size


def _linear(inputs: int, outputs: int) -> dict[str, Any]:
    return {"class_path": "torch.nn.Linear", "init_args": {"in_features": inputs, "out_features": outputs}}


BLOCKS = [[_linear(4, 8), True], [{"class_path": "torch.nn.Tanh"}, False], [_linear(8, 3), True]]


def fitted(folder: Path, callback: dict[str, Any], model: dict[str, Any]) -> tuple[ManifoldMixupCallback, Any]:
    """The callback and the module after the fit of two steps that a file describes."""
    from lightning.pytorch.cli import LightningCLI

    trainer = {
        "max_steps": 2,
        "accelerator": "cpu",
        "default_root_dir": str(folder),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "mm_lightning.ManifoldMixupCallback", "init_args": callback}],
    }
    file = folder / "fit.yaml"
    file.write_text(
        yaml.safe_dump({"seed_everything": False, "trainer": trainer, "model": {"blocks": BLOCKS, **model}})
    )
    cli = LightningCLI(MixableModule, Data, args=["fit", "--config", str(file)])  # which saves what it was given
    assert cli.trainer.global_step == 2
    (mixing,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, ManifoldMixupCallback)]
    return mixing, cli.model


def test_every_argument_of_the_callback_is_taken(tmp_path: Path) -> None:
    settings = {
        "alpha": 0.5,
        "layers": ["input", "blocks.0"],
        "per_sample": False,
        "probability": 1.0,
        "seed": 3,
        "layer_weights": [0, 2.5],
        "loss": ["loss"],
        "batch_dim": {"blocks.0": 0},
        "batch_size": 8,
        "union_masks": False,
        "strict": True,
    }
    callback, _ = fitted(tmp_path, {**settings, "pairing": {"class_path": "mm_lightning.Roll"}}, {})
    assert {name: getattr(callback, name) for name in settings} == settings
    assert callback.pairing == Roll()
    assert callback.summary() == {"input": 0, "blocks.0": 2, "unmixed": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", "input"), ("layers", "auto"), ("loss", "loss"), ("batch_dim", 0), ("seed", None), ("loss", None)],
)
def test_an_argument_that_is_no_list_is_taken(name: str, value: Any, tmp_path: Path) -> None:
    callback, _ = fitted(tmp_path, {name: value}, {})
    assert getattr(callback, name) == value
    assert callback.summary()["unmixed"] == 0


def test_a_pairing_of_ones_own_is_taken(tmp_path: Path) -> None:
    pairing = {"class_path": f"{__name__}.Backwards", "init_args": {"shift": 2}}
    callback, _ = fitted(tmp_path, {"pairing": pairing}, {})
    assert isinstance(callback.pairing, Backwards)
    assert callback.plan is not None
    assert callback.plan.partner.tolist() == [1, 0, 7, 6, 5, 4, 3, 2]


HALF = {"class_path": "mm_lightning.BetaRatio", "init_args": {"alpha": 0.5}}
WAYS = [
    ({"ratio": {"class_path": "mm_lightning.FoldedRatio"}}, FoldedRatio()),
    ({"ratio": {"class_path": "mm_lightning.FoldedRatio", "init_args": {"ratio": HALF}}}, FoldedRatio(BetaRatio(0.5))),
    ({"ratio": {"class_path": "mm_lightning.UniformRatio", "init_args": {"low": 0.3}}}, UniformRatio(0.3)),
    ({"pairing": {"class_path": "mm_lightning.NearestNeighbors"}}, NearestNeighbors()),
    ({"interpolation": {"class_path": "mm_lightning.ChannelMix"}}, ChannelMix()),
    ({"schedule": {"class_path": "mm_lightning.Until", "init_args": {"end": 0.5}}}, Until(0.5)),
    ({"schedule": {"alpha": {"class_path": "mm_lightning.WarmUp"}}}, {"alpha": WarmUp()}),
]


@pytest.mark.parametrize(("settings", "expected"), WAYS, ids=lambda value: str(value) if callable(value) else None)
def test_every_way_can_come_from_a_file(settings: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    callback, _ = fitted(tmp_path, settings, {})
    (name,) = settings
    assert getattr(callback, name) == expected


def test_every_argument_of_the_module_is_taken(tmp_path: Path) -> None:
    settings = {
        "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "scheduler_interval": "step",
        "num_classes": 3,
    }
    callback, model = fitted(tmp_path, {}, settings)
    assert callback.layer_names == ("input", "mix_before.2")
    assert isinstance(model.loss, nn.CrossEntropyLoss)
    assert model.loss.label_smoothing == 0.1
    configured = model.configure_optimizers()
    assert isinstance(configured["optimizer"], SGD)
    assert isinstance(configured["lr_scheduler"]["scheduler"], StepLR)
    assert model.lr_schedulers().get_last_lr() == [0.1 * 0.5**2]
