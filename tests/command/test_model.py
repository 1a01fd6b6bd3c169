"""What the data tell the model, and the optimizer of a module that has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.command.model import build_model, fitted_to_data, record
from mm_lightning.models import mlp_blocks

HERE = __name__
RUN = {
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5},
    "scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 1, "gamma": 0.1},
}


def configured(**model: Any) -> DictConfig:
    config = OmegaConf.create({"model": model, **RUN})
    OmegaConf.set_struct(config, True)
    return config


class Data(pl.LightningDataModule):
    """Knows after ``setup()`` what it is told here; ``set_up`` counts."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.facts, self.set_up = facts, 0

    def setup(self, stage: str) -> None:
        self.set_up += 1
        vars(self).update(self.facts)


class Known(Data):
    num_classes = 3
    input_shape = (1, 4, 4)


class Module(pl.LightningModule):
    def __init__(self, num_classes: int = 7, input_shape: Any = None, width: int = 2) -> None:
        super().__init__()
        self.num_classes, self.input_shape = num_classes, input_shape
        self.net = nn.Linear(2, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Requiring(Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)


class Taking(Module):
    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__()
        self.made_by = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        return self.made_by[0](self.parameters())


class Own(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.25)


def test_null_becomes_the_datas_wherever_it_stands() -> None:
    nested = {"_target_": f"{HERE}.Module", "deep": {"in_channels": None, "num_classes": None}}
    config = configured(_target_="builtins.dict", input_shape=None, nested=nested)
    model = fitted_to_data(config, Known()).model
    assert (model.input_shape, model.nested.deep) == ([1, 4, 4], {"in_channels": 1, "num_classes": 3})
    assert config.model.input_shape is None


def test_what_the_module_takes_and_nobody_gives_is_the_datas() -> None:
    model = fitted_to_data(configured(_target_=f"{HERE}.Module", width=4), Known()).model
    assert model == {"_target_": f"{HERE}.Module", "width": 4, "num_classes": 3, "input_shape": [1, 4, 4]}


def test_data_are_set_up_only_for_what_is_needed_and_once() -> None:
    data = Data(num_classes=5, input_shape=(2,))
    assert "num_classes" not in fitted_to_data(configured(_target_=f"{HERE}.Module"), data).model
    assert data.set_up == 0
    assert fitted_to_data(configured(_target_=f"{HERE}.Requiring"), data).model.num_classes == 5
    config = fitted_to_data(configured(_target_=f"{HERE}.Module", num_classes=None, input_shape=None), data)
    assert (config.model.num_classes, config.model.input_shape, data.set_up) == (5, [2], 1)


def test_null_stays_null_where_the_data_do_not_say() -> None:
    config = configured(_target_=f"{HERE}.Module", num_classes=None, in_channels=None)
    assert fitted_to_data(config, Data()).model == config.model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_classes": 10}, r"^model\.num_classes is 10, but that of the data \(Known\) is 3\. Leave it null"),
        ({"input_shape": [3, 4, 4]}, r"model\.input_shape is \[3, 4, 4\], .* is \[1, 4, 4\]"),
        ({"net": {"in_channels": 3}}, r"model\.net\.in_channels is 3, .* is 1"),
    ],
    ids=["classes", "shape", "channels"],
)
def test_another_number_than_the_datas_is_refused_with_both(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted_to_data(configured(_target_=f"{HERE}.Module", **given), Known())
    fitted_to_data(configured(_target_=f"{HERE}.Module", num_classes=3, input_shape=[1, 4, 4]), Known())


def test_a_model_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\._target_ is missing\. Give the class of a LightningModule"):
        fitted_to_data(configured(_target_="???"), Known())


def test_a_network_that_is_no_module_is_refused() -> None:
    config = configured(_target_="torch.nn.Linear", in_features=2, out_features=3)
    with pytest.raises(TypeError, match=r"must be a LightningModule, got one of type Linear\."):
        build_model(config)


def fit(module: pl.LightningModule, make_trainer: Callable[..., pl.Trainer]) -> torch.optim.Optimizer:
    rows = DataLoader(TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 2, 0])), batch_size=2)
    trainer = make_trainer()
    trainer.fit(module, rows)
    return trainer.optimizers[0]


def test_a_module_without_an_optimizer_gets_the_configured_one_and_its_schedule(
    make_trainer: Callable[..., pl.Trainer],
) -> None:
    optimizer = fit(build_model(configured(_target_=f"{HERE}.Module")), make_trainer)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)  # divided by ten after the epoch


def test_a_module_that_takes_the_optimizer_is_given_it(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = build_model(fitted_to_data(configured(_target_=f"{HERE}.Taking"), Known()))
    assert all(map(callable, module.made_by))
    optimizer = fit(module, make_trainer)
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.SGD, 0.5)


def test_a_module_with_its_own_optimizer_keeps_it(make_trainer: Callable[..., pl.Trainer]) -> None:
    optimizer = fit(build_model(fitted_to_data(configured(_target_=f"{HERE}.Own"), Known())), make_trainer)
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.Adam, 0.25)


def test_what_is_recorded_builds_the_model_without_the_data(tmp_path: Path) -> None:
    blocks = {"_target_": "mm_lightning.models.mlp_blocks", "sizes": [None, 5, None], "mix_before": [0]}
    blocks |= {"input_shape": None, "num_classes": None}
    config = configured(_target_="mm_lightning.MixableModule", blocks=blocks)
    record(tmp_path, fitted_to_data(config, Known()))
    module = build_model(OmegaConf.load(tmp_path / "config.yaml"))
    expected = nn.ModuleList(block for block, _ in mlp_blocks([16, 5, 3]))
    shapes = [tuple(tensor.shape) for tensor in expected.parameters()]
    assert [tuple(tensor.shape) for tensor in module.blocks.parameters()] == shapes == [(5, 16), (5,), (3, 5), (3,)]
