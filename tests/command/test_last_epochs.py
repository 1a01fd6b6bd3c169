"""The medians of the last epochs, where no epoch is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from versions import OF_WEIGHTS

from mm_lightning.command.last_epochs import LastEpochs

ACCURACIES = [0.125, 0.5, 0.875, 0.25, 0.75, 0.375, 0.625]


class Scripted(pl.LightningModule):
    """Logs these accuracies, one after each epoch, and ten times as much as NLL; in the test the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.linear(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val/acc": ACCURACIES[self.current_epoch], "val/nll": 10 * ACCURACIES[self.current_epoch]})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/acc", 0.25)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, validates_on_test: bool = True) -> None:
        super().__init__()
        self.validates_on_test = validates_on_test

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(2, 1)))

    val_dataloader = test_dataloader = train_dataloader


def metrics_of(trainer: pl.Trainer, data: Any) -> dict[str, float]:
    trainer.test(trainer.lightning_module, data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("epochs", "num_epochs", "acc", "count"),
    [
        pytest.param(7, 3, 0.625, 3, id="the last three: 0.75, 0.375, 0.625"),
        pytest.param(7, 4, 0.5, 4, id="of four the mean of the middle ones: 0.25, 0.75, 0.375, 0.625"),
        pytest.param(7, 1, 0.625, 1, id="the last one"),
        pytest.param(3, 10, 0.5, 3, id="fewer than asked for: 0.125, 0.5, 0.875"),
    ],
)
def test_a_test_has_the_medians_of_the_last_epochs(
    epochs: int, num_epochs: int, acc: float, count: int, make_trainer: Callable[..., pl.Trainer]
) -> None:
    trainer, data = make_trainer(LastEpochs(num_epochs), max_epochs=epochs, num_sanity_val_steps=1), Data()
    trainer.fit(Scripted(), datamodule=data)
    expected = {"test/acc": 0.25, f"test/acc_median{count}": acc, f"test/nll_median{count}": 10 * acc}
    assert metrics_of(trainer, data) == expected


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_goes_on_with_the_epochs_before(make_trainer: Callable[..., pl.Trainer], tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    make_trainer(LastEpochs(4), saving, enable_checkpointing=True, max_epochs=6).fit(Scripted(), datamodule=Data())
    resumed = make_trainer(LastEpochs(4), max_epochs=7)
    resumed.fit(Scripted(), datamodule=Data(), ckpt_path=tmp_path / "epoch=5.ckpt", **OF_WEIGHTS)
    assert metrics_of(resumed, Data())["test/acc_median4"] == 0.5


def test_a_second_fit_begins_anew(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = LastEpochs(10)
    make_trainer(callback, max_epochs=7).fit(Scripted(), datamodule=Data())
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Scripted(), datamodule=Data())
    assert metrics_of(trainer, Data())["test/acc_median1"] == 0.125


def test_a_validation_by_itself_is_no_epoch(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = LastEpochs(10)
    trainer = make_trainer(callback, max_epochs=3)
    trainer.fit(Scripted(), datamodule=Data())
    before = callback.state_dict()
    trainer.validate(trainer.lightning_module, Data(), verbose=False)
    assert callback.state_dict() == before == {"by_epoch": {"0": [0.125, 1.25], "1": [0.5, 5.0], "2": [0.875, 8.75]}}


def test_neither_is_the_check_before_training(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = LastEpochs(10)
    trainer = make_trainer(callback, max_epochs=2, num_sanity_val_steps=1, check_val_every_n_epoch=2)
    trainer.fit(Scripted(), datamodule=Data())
    assert callback.state_dict() == {"by_epoch": {"1": [0.5, 5.0]}}


@pytest.mark.parametrize("loader", [False, True], ids=["data module", "loader"])
def test_nothing_is_added_where_validation_sees_other_images(
    loader: bool, make_trainer: Callable[..., pl.Trainer]
) -> None:
    trainer, data = make_trainer(LastEpochs(), max_epochs=2), Data(validates_on_test=False)
    if loader:
        trainer.fit(Scripted(), data.train_dataloader(), data.val_dataloader())
    else:
        trainer.fit(Scripted(), datamodule=data)
    assert metrics_of(trainer, data.test_dataloader() if loader else data) == {"test/acc": 0.25}


def test_a_metric_that_is_not_logged_is_refused(make_trainer: Callable[..., pl.Trainer]) -> None:
    trainer = make_trainer(LastEpochs(metrics=["acc", "f1"]))
    with pytest.raises(ValueError, match=r"keeps 'val/f1', which is not logged\. Logged are val/acc, val/nll\."):
        trainer.fit(Scripted(), datamodule=Data())


@pytest.mark.parametrize(("number", "error"), [(0, ValueError), (2.5, TypeError)])
def test_numbers_that_cannot_be_are_refused(number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"num_epochs must be an integer >= 1, got {number}"):
        LastEpochs(number)
