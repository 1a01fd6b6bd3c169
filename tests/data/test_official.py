"""Splits and batches of the official data sets, from a few images in their official form, and what may choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from official_files import KINDS, TRAIN, held, pixels, write_official
from torch import Tensor, nn
from torch.testing import assert_close
from versions import resumes

from mm_lightning.command.best_checkpoint import BestCheckpoint
from mm_lightning.data import OfficialDataModule
from mm_lightning.data.image_batches import ImageTransform

NAMES = ["cifar10", "cifar100", "svhn", "tiny_imagenet"]
PLAIN = {"num_validation": 10, "batch_size": 8, "crop_padding": 0, "flip": False}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OfficialDataModule]:
    """A data module that has loaded the few images."""

    def build(name: str, **settings: Any) -> OfficialDataModule:
        write_official(monkeypatch, name, tmp_path / name)
        data: OfficialDataModule = KINDS[name](tmp_path / name, **{**PLAIN, **settings})
        data.setup("fit")
        return data

    return build


def test_validation_rows_are_drawn_class_by_class(build: Callable[..., OfficialDataModule]) -> None:
    first, again, other = (held(build("cifar10", data_seed=seed)) for seed in (0, 0, 1))
    assert first["val"][1].bincount().tolist() == [1] * 10
    assert first["train"][1].bincount().tolist() == [3] * 10
    rows = torch.cat([first["train"][0], first["val"][0]]).flatten(1).tolist()
    assert sorted(rows) == sorted(torch.from_numpy(pixels(TRAIN, 0)).flatten(1).tolist())
    assert torch.equal(first["val"][0], again["val"][0])
    assert not torch.equal(first["val"][0], other["val"][0])
    assert torch.equal(first["test"][0], other["test"][0])


def test_without_validation_rows_all_are_trained_on_and_validation_sees_the_test(
    build: Callable[..., OfficialDataModule],
) -> None:
    data = build("cifar10", num_validation=0)
    assert data.validates_on_test
    assert len(held(data)["train"][0]) == TRAIN
    assert torch.equal(held(data)["val"][0], held(data)["test"][0])
    assert not build("cifar10").validates_on_test


def test_a_limit_keeps_images_of_all_classes(build: Callable[..., OfficialDataModule]) -> None:
    for name in NAMES:
        assert len(held(build(name, num_validation=0, limit=10))["train"][1].unique()) == 10


def test_a_limit_keeps_the_first_images_of_each_split(build: Callable[..., OfficialDataModule]) -> None:
    whole, few = (held(build("cifar10", limit=limit)) for limit in (None, 4))
    for split in ("train", "val", "test"):
        assert torch.equal(few[split][0], whole[split][0][:4])


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        ("cifar100", (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
        ("svhn", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        ("tiny_imagenet", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    ],
)
def test_pixels_are_normalised_as_in_the_code_of_the_paper(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], build: Callable[..., OfficialDataModule]
) -> None:
    data = build(name)
    images, _ = next(iter(data.test_dataloader()))
    channels = [(held(data)["test"][0][:, c].double() - mean[c]) / std[c] for c in range(3)]
    assert_close(images.double(), torch.stack(channels, dim=1)[: len(images)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_normalisation_is_told_to_what_measures_in_pixels(
    name: str, build: Callable[..., OfficialDataModule]
) -> None:
    data = build(name)
    assert data.normalization is not None
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in data.normalization)
    images, _ = next(iter(data.test_dataloader()))
    assert_close(images * std + mean, held(data)["test"][0][: len(images)] / 255, rtol=0, atol=1e-6)


def test_training_images_are_cropped_and_flipped_and_no_others(build: Callable[..., OfficialDataModule]) -> None:
    settings: dict[str, Any] = {"crop_padding": 4, "flip": True, "seed": 3}
    data, still = (build("cifar10", batch_size=TRAIN, **{"seed": 3, **chosen}) for chosen in (settings, {}))
    (moved, own), (images, targets) = next(iter(data.train_dataloader())), next(iter(still.train_dataloader()))
    assert torch.equal(own, targets)
    assert sum(torch.equal(one, other) for one, other in zip(moved, images, strict=True)) < 3
    assert data.transform("train") == ImageTransform(data.mean, data.std, padding=4, flip=True, seed=3)
    assert data.transform("val") == data.transform("test") == ImageTransform(data.mean, data.std)
    for split in ("val", "test"):
        loaders = [getattr(one, f"{split}_dataloader")() for one in (data, still)]
        assert torch.equal(next(iter(loaders[0]))[0], next(iter(loaders[1]))[0])


class Recorder(pl.LightningModule):
    """Keeps the sum of each image that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.seen: list[tuple[int, int, list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sums = (batch[0] * torch.arange(32)).sum((1, 2, 3))
        self.seen.append((self.current_epoch, batch_idx, sums.tolist()))
        return self.linear(sums[:, None] / 1e4).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@resumes
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_epoch_repeats_its_crops(
    build: Callable[..., OfficialDataModule], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"crop_padding": 4, "flip": True}
    straight, resumed = Recorder(), Recorder()
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    few: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0}
    make_trainer(saving, enable_checkpointing=True, **few).fit(straight, datamodule=build("cifar10", **settings))
    assert len({str(sums) for _, _, sums in straight.seen}) == len(straight.seen) == 12
    state = torch.get_rng_state()
    make_trainer(**few).fit(
        resumed, datamodule=build("cifar10", **settings), ckpt_path=tmp_path / "step=6.ckpt", weights_only=False
    )
    assert resumed.seen == straight.seen[6:]
    assert torch.equal(torch.get_rng_state(), state)


# --- what may not be chosen, and arguments


@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (lambda: BestCheckpoint(), "BestCheckpoint"),
        (lambda: ModelCheckpoint(monitor="val/acc", mode="max"), "ModelCheckpoint"),
        (lambda: EarlyStopping(monitor="val/nll"), "EarlyStopping"),
    ],
)
def test_no_epoch_is_chosen_by_the_test_images(
    callback: Callable[[], Any],
    name: str,
    build: Callable[..., OfficialDataModule],
    make_trainer: Callable[..., pl.Trainer],
) -> None:
    data = build("cifar10", num_validation=0)
    with pytest.raises(ValueError, match=rf"num_validation=0 validates on the test images, and {name} chooses by them"):
        make_trainer(callback(), enable_checkpointing=True).fit(Recorder(), datamodule=data)


def test_what_chooses_by_other_images_is_left_alone(
    build: Callable[..., OfficialDataModule], make_trainer: Callable[..., pl.Trainer]
) -> None:
    module = Recorder()
    chosen = [
        BestCheckpoint(monitor=None),
        EarlyStopping(monitor="train/loss", strict=False, check_on_train_epoch_end=False),
    ]
    few: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0}
    make_trainer(*chosen[:1], **few).fit(module, datamodule=build("cifar10", num_validation=0))
    data = build("cifar10", num_validation=0)
    data.trainer = make_trainer(*chosen, **few)
    data.setup("fit")
    for data, stage in ((build("cifar10"), "fit"), (build("cifar10", num_validation=0), "test")):
        data.trainer = make_trainer(EarlyStopping(monitor="val/acc"), **few)
        data.setup(stage)
    assert len(module.seen) == 5


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"root": None}, TypeError, r"root must be the folder of cifar-10-binary\.tar\.gz, got None .*\(170 MB\)"),
        ({"download": "yes"}, TypeError, "download must be True or False, got 'yes'"),
        ({"num_validation": 50_000}, ValueError, r"num_validation must be an integer in \[0, 49999\], got 50000\."),
        ({"num_validation": 0.1}, TypeError, "num_validation must be an integer"),
        ({"crop_padding": -1}, ValueError, "crop_padding must be an integer >= 0, got -1"),
        ({"flip": 1}, TypeError, "flip must be True or False, got 1"),
        ({"limit": 0}, ValueError, "limit must be an integer >= 1, got 0"),
        ({"data_seed": -1}, ValueError, "data_seed must be an integer in"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        KINDS["cifar10"](**{"root": tmp_path, "download": True, **settings})
