"""The two names of Lightning: what is said of ``lightning.pytorch`` holds for ``pytorch_lightning``."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from inspect import getattr_static, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from classifier import LAYERS, Network, Plans, assert_same_weights, batches, loader, mixup, train_by_hand
from lightning_utilities.core import rank_zero
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import mm_lightning
from mm_lightning import ManifoldMixupCallback, MixableModule, namespaces
from mm_lightning.data import SpiralsDataModule
from mm_lightning.diagnostics import HiddenSpace, MixupMonitor

PACKAGES = [lightning.pytorch, pytorch_lightning]
both = pytest.mark.parametrize("package", PACKAGES, ids=["lightning.pytorch", "pytorch_lightning"])


def trainer(package: ModuleType, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    few = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 2, "limit_test_batches": 2}
    return package.Trainer(callbacks=list(callbacks), **{**quiet, **few, **settings})


def classifier(package: ModuleType) -> Any:
    class Classifier(Network, package.LightningModule):  # type: ignore[misc,name-defined]
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def blocks() -> MixableModule:
    torch.manual_seed(0)
    return MixableModule([(nn.Linear(2, 8), True), (nn.ReLU(), False), (nn.Linear(8, 2), True)])


@both
def test_a_module_of_either_is_trained_as_by_hand(package: ModuleType, tmp_path: Path) -> None:
    callback = mixup()
    plans, model = Plans(callback), classifier(package)

    class Kept(package.Callback):  # type: ignore[misc,name-defined]
        on_train_batch_end = plans.on_train_batch_end

    trainer(package, tmp_path, callback, Kept()).fit(model, loader())
    assert_same_weights(model, train_by_hand(plans.plans, 2 * batches()))


@both
def test_a_module_of_either_is_inspected(package: ModuleType) -> None:
    report = mm_lightning.inspect(classifier(package), batches()[0])
    assert report.safe == (*LAYERS, "head")


def test_module_data_and_diagnostics_are_the_same_under_both_names(tmp_path: Path) -> None:
    found = []
    for package in PACKAGES:
        model, data = blocks(), SpiralsDataModule()
        logger = package.loggers.TensorBoardLogger(tmp_path, name=package.__name__)
        watching = [ManifoldMixupCallback(seed=3), HiddenSpace("mix_before.2"), MixupMonitor()]
        fitted = trainer(package, tmp_path / package.__name__, *watching, logger=logger, log_every_n_steps=1)
        fitted.fit(model, data)
        metrics = {**fitted.callback_metrics, **fitted.test(model, data, verbose=False)[0]}
        events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
        histograms = {tag: events.Histograms(tag)[-1].histogram_value for tag in events.Tags()["histograms"]}
        pictures = sorted(events.Tags()["images"])
        found.append((metrics, histograms, pictures, model.state_dict()))
    (metrics, histograms, pictures, weights), others = found[0], found[1]
    assert {"val/acc", "test/ece", "mixup/lam", "train/acc_mixed"} <= metrics.keys()
    assert histograms.keys() == {"mixup/lam_of_epoch", "mixup/layer_of_epoch"}
    assert pictures == ["hidden_space/test", "hidden_space/val", "mixup_monitor/epoch"]
    assert (histograms, pictures) == others[1:3]
    torch.testing.assert_close((metrics, weights), (others[0], others[3]), rtol=0, atol=0, equal_nan=True)


@both
def test_data_of_either_are_looked_at_after_training(package: ModuleType, tmp_path: Path) -> None:
    class Data(package.LightningDataModule):  # type: ignore[misc,name-defined]
        def train_dataloader(self) -> Any:
            return loader()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            asked.append(self.trainer.training)
            return batch

    asked: list[bool] = []
    watching = HiddenSpace("second", train_points=20, forward=lambda module, batch: module(batch[0]))
    trainer(package, tmp_path, watching, max_epochs=1).fit(classifier(package), datamodule=Data())
    assert asked == [True] * 5 + [False] * 3  # 20 rows are in three batches of 8


HOOKS = {
    "LightningModule": (MixableModule, lambda: blocks(), {"training_step", "forward", "on_train_epoch_end"}),
    "LightningDataModule": (SpiralsDataModule, SpiralsDataModule, {"train_dataloader", "setup"}),
}


@both
@pytest.mark.parametrize("kind", HOOKS)
def test_a_trainer_sees_what_is_overridden_and_nothing_else(package: ModuleType, kind: str) -> None:
    ours, make, some = HOOKS[kind]
    thing = make()
    thing.trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    written = [cls for cls in ours.__mro__ if cls.__module__.startswith("mm_lightning.")]
    defined = {name for cls in written if not cls.__name__.endswith("OfBoth") for name in vars(cls)}
    base = getattr(package, kind)
    hooks = [name for name in dir(base) if not name.startswith("_") and isfunction(getattr_static(base, name))]
    is_overridden = package.utilities.model_helpers.is_overridden
    seen = {name for name in hooks if is_overridden(name, thing)}
    assert some <= seen | {"forward"}
    assert seen == {name for name in hooks if name in defined}


def test_a_copied_and_a_pickled_module_are_of_both(tmp_path: Path) -> None:
    model = blocks()
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert all(isinstance(twin, package.LightningModule) for package in PACKAGES)
        trainer(pytorch_lightning, tmp_path).fit(twin, SpiralsDataModule())


def test_classes_are_those_of_both() -> None:
    loggers = namespaces.classes("loggers.TensorBoardLogger")
    assert loggers == tuple(package.loggers.TensorBoardLogger for package in PACKAGES)
    assert namespaces.classes("Trainer") == tuple(package.Trainer for package in PACKAGES)


@both
def test_the_package_of_a_thing_is_found(package: ModuleType) -> None:
    assert namespaces.package_of(classifier(package)) is package
    assert namespaces.package_of(package.Callback()) is package
    assert namespaces.version_of(package.Callback()) == tuple(map(int, package.__version__.split(".")[:2]))
    assert namespaces.package_of(blocks()) is lightning.pytorch  # of both


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import lightning.pytorch", "import pytorch_lightning"])
def test_importing_both_leaves_the_log_where_the_first_has_put_it(first: str) -> None:
    name = run(
        f"{first}\nfrom mm_lightning.namespaces import Trainer\n"
        "from lightning_utilities.core.rank_zero import log\nprint(log.name)"
    )
    assert name == f"{first.split()[-1] if first else 'lightning.pytorch'}.utilities.rank_zero"


@pytest.mark.parametrize("silenced", ["lightning.pytorch", "pytorch_lightning"])
def test_who_silences_either_silences_messages(silenced: str) -> None:
    said: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger(silenced)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [rank_zero.log, *(logging.getLogger(package.__name__) for package in PACKAGES)]
    levels = [one.level for one in loggers]
    rank_zero.log.addHandler(handler)
    try:
        for one in loggers:
            one.setLevel(logging.INFO)
        rank_zero.rank_zero_info("before")
        logger.setLevel(logging.ERROR)
        rank_zero.rank_zero_info("after")
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        rank_zero.log.removeHandler(handler)
    assert said == ["before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup",
    ["sys.modules['pytorch_lightning'] = None", "import pytorch_lightning\npytorch_lightning.__version__ = '1.9.5'"],
    ids=["missing", "too old"],
)
def test_without_the_second_package_the_first_is_all(setup: str) -> None:
    code = (
        f"import sys\n{setup}\nimport lightning.pytorch as pl\n"
        "from mm_lightning import ManifoldMixupCallback, MixableModule\nfrom mm_lightning import namespaces\n"
        "print(ManifoldMixupCallback.__bases__ == (pl.Callback,), MixableModule.__bases__ == (pl.LightningModule,), "
        "namespaces.classes('Trainer') == (pl.Trainer,), isinstance(MixableModule, type))"
    )
    assert run(code) == "True True True True"
