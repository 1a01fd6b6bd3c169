"""Which checkpoint is kept, by what a module logs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.command.best_checkpoint import BestCheckpoint
from mm_lightning.command.metric_names import direction_of, found_metric

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")


class Module(pl.LightningModule):
    """Logs the given values, an epoch each, in validation; its weight is the number of steps taken, one an epoch."""

    def __init__(self, **values: Sequence[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.values = values

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.weight

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for key, values in self.values.items():
            self.log(key, values[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


Fit = Callable[..., BestCheckpoint]


@pytest.fixture
def fit(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> Fit:
    loader = DataLoader(TensorDataset(torch.zeros(1, 1)))

    def fit(module: Module, validated: bool = True, ckpt_path: Path | None = None, **settings: Any) -> BestCheckpoint:
        kept = BestCheckpoint(
            **{"dirpath": tmp_path, "filename": "best", "save_last": True, "enable_version_counter": False, **settings}
        )
        trainer = make_trainer(kept, enable_checkpointing=True, max_epochs=3)
        trainer.fit(module, loader, loader if validated else None, ckpt_path=ckpt_path)
        return kept

    return fit


def epochs_of(folder: Path) -> dict[str, float]:
    """For each checkpoint, how many epochs its weight has seen."""
    return {
        path.stem: float(torch.load(path, weights_only=True)["state_dict"]["weight"]) for path in folder.glob("*.ckpt")
    }


@pytest.mark.parametrize(
    ("values", "monitor", "best"),
    [
        pytest.param({"val_acc": [0.1, 0.3, 0.2]}, "val_acc", 2, id="val_acc"),
        pytest.param({"val_accuracy": [0.5, 0.3, 0.2]}, "val_accuracy", 1, id="val_accuracy"),
        pytest.param({"val_loss": [0.5, 0.1, 0.2]}, "val_loss", 2, id="val_loss"),
        pytest.param({"val_loss": [0.1, 0.2, 0.3], "val_acc": [0.1, 0.2, 0.3]}, "val_acc", 3, id="acc before loss"),
    ],
)
def test_the_best_epoch_by_what_is_logged_is_kept(
    values: dict[str, list[float]], monitor: str, best: int, fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    kept = fit(Module(**values))
    assert kept.monitor == monitor
    assert epochs_of(tmp_path) == {"best": best, "last": 3}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("validated", "values", "logged"),
    [
        pytest.param(False, {}, "nothing is logged", id="no validation"),
        pytest.param(True, {"val_foo": [1.0, 2.0, 3.0]}, "logged are 'val_foo'", id="another metric"),
    ],
)
def test_without_a_metric_the_last_is_kept_and_that_is_said_once(
    validated: bool, values: dict[str, list[float]], logged: str, fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    fit(Module(**values), validated)
    assert epochs_of(tmp_path) == {"last": 3}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Checkpoint   only the last one is kept: of a validation, no metric like 'val/acc'")
    assert logged in line
    assert line.endswith("Name one with callbacks.checkpoint.monitor=KEY callbacks.checkpoint.mode=max or min.")


def test_a_named_metric_that_is_not_logged_is_not_fatal(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    fit(Module(val_acc=[0.1, 0.3, 0.2]), monitor="val/acc")
    assert epochs_of(tmp_path) == {"last": 3}
    assert "callbacks.checkpoint.monitor 'val/acc' is not logged; logged are 'val_acc'." in capsys.readouterr().out


def test_a_named_metric_is_judged_by_its_name_or_as_said(fit: Fit, tmp_path: Path) -> None:
    values = {"val_loss": [0.5, 0.1, 0.2], "val_acc": [0.1, 0.2, 0.3], "val_foo": [2.0, 3.0, 1.0]}
    for monitor, mode, best in (("val_loss", "auto", 2), ("val_foo", "min", 3), ("auto", "min", 2)):
        fit(Module(**values), monitor=monitor, mode=mode)
        assert epochs_of(tmp_path)["best"] == best


def test_no_monitor_and_no_best_leave_the_last_alone(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    fit(Module(val_acc=[0.1, 0.3, 0.2]), monitor=None, save_top_k=0, every_n_epochs=3)
    assert (os.listdir(tmp_path), capsys.readouterr().out) == (["last.ckpt"], "")


def test_a_resumed_run_knows_the_best_of_before(fit: Fit, tmp_path: Path) -> None:
    kept = fit(Module(val_loss=[0.1, 0.2, 0.3]))
    assert epochs_of(tmp_path)["best"] == 1
    again = BestCheckpoint(dirpath=tmp_path)
    again.load_state_dict(kept.state_dict())
    assert again.state_key == kept.state_key
    assert (again.best_model_path, float(again.best_model_score or 0)) == (
        str(tmp_path / "best.ckpt"),
        pytest.approx(0.1),
    )


@pytest.mark.parametrize(
    ("logged", "found"),
    [
        (["train/acc", "val/acc"], "val/acc"),
        (["val/nll", "val/loss", "val/ece"], "val/loss"),
        (["valid_loss", "valid_f1"], "valid_f1"),
        (["validation/Accuracy", "validation/loss"], "validation/Accuracy"),
        (["valLoss"], "valLoss"),
        (["loss/val", "loss/train"], "loss/val"),
        (["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"], "val_loss/dataloader_idx_0"),
        (["val_loss_step", "val_loss_epoch"], "val_loss_epoch"),
        (["val/calibration/ece", "val/acc"], "val/acc"),
        (["train_loss", "interval_loss", "value_loss"], None),
        ([], None),
    ],
)
def test_metric_is_found_by_its_words(logged: list[str], found: str | None) -> None:
    assert found_metric(logged) == found


@pytest.mark.parametrize(
    ("key", "direction"), [("val/acc", "max"), ("val_loss", "min"), ("rmse/val", "min"), ("val/foo", None)]
)
def test_direction_is_read_from_the_name(key: str, direction: str | None) -> None:
    assert direction_of(key) == direction


def test_a_direction_that_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"monitor 'val/foo' does not tell .* Say callbacks\.checkpoint\.mode="):
        BestCheckpoint(monitor="val/foo")
    with pytest.raises(ValueError, match="mode must be auto, max or min, got 'best'"):
        BestCheckpoint(mode="best")
