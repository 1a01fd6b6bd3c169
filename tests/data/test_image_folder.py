import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from versions import resumes

from mm_lightning.data import ImageFolderDataModule
from mm_lightning.data.image_files import decode
from mm_lightning.models import classifier

PLAIN = {"size": 8, "crop_padding": 0, "flip": False, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def write(folder: Path, count: int, grey: int, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> None:
    """Images of one colour each: ``grey``, ``grey + 1``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (grey + i, 0, 10)).convert(mode).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k, name in enumerate(("emu", "cat", "dog")):
        write(tmp_path / "pets" / name, 20, 40 * k)
    return tmp_path / "pets"


def set_up(root: Path, **settings: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(root, **{**PLAIN, **settings})
    data.setup()
    return data


def batches(data: ImageFolderDataModule) -> dict[str, tuple[Tensor, Tensor]]:
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    return {name: tuple(map(torch.cat, zip(*loader, strict=True))) for name, loader in loaders.items()}


@pytest.mark.parametrize("memory", [2000, 0], ids=["held", "read for each batch"])
def test_each_image_is_in_one_split_with_the_class_of_its_folder(root: Path, memory: float) -> None:
    data = set_up(root, memory=memory, num_workers=0)
    assert (data.num_classes, data.class_names, data.input_shape) == (3, ("cat", "dog", "emu"), (3, 8, 8))
    found = batches(data)
    assert {name: len(targets) for name, (_, targets) in found.items()} == {"train": 48, "val": 6, "test": 6}
    reds = {}
    for pixels, targets in found.values():
        assert pixels.shape[1:] == (3, 8, 8)
        for image, target in zip(pixels, targets.tolist(), strict=True):
            reds[round(float(image[0, 0, 0]) * 255)] = target
            torch.testing.assert_close(image[2], torch.full((8, 8), 10 / 255))
    # red 0 to 19 is emu, class 2; 40 to 59 is cat; 80 to 99 is dog
    assert reds == {40 * k + i: target for k, target in enumerate((2, 0, 1)) for i in range(20)}
    assert torch.bincount(found["test"][1]).tolist() == [2, 2, 2]


def test_images_held_and_read_for_each_batch_are_the_same_batches(root: Path) -> None:
    held, read = (set_up(root, memory=m, num_workers=0, crop_padding=2, flip=True, batch_size=7) for m in (2000, 0))
    for own, other in zip(held.train_dataloader(), read.train_dataloader(), strict=True):
        assert torch.equal(own[0], other[0])
        assert torch.equal(own[1], other[1])


def test_training_images_alone_are_cropped_and_flipped(root: Path) -> None:
    data = set_up(root, crop_padding=3, flip=True, batch_size=48)
    (images, _), (val, _) = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    black = (images[:, 2] == 0).flatten(1).any(1)  # the border that the crop has reached into
    assert 30 < int(black.sum()) <= 48
    assert float(val[:, 2].min()) == pytest.approx(10 / 255)
    again = next(iter(data.train_dataloader()))[0]
    assert torch.equal(images, again)


def test_images_are_resized_and_converted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 10, 100, mode="P", size=(11, 5))
        Image.new("RGBA", (3, 3), (100, 0, 10, 7)).save(tmp_path / name / "x.webp")
    grey = set_up(tmp_path, channels=1, mean=[0.0], std=[1.0])
    assert grey.input_shape == (1, 8, 8)
    assert next(iter(grey.val_dataloader()))[0].shape[1:] == (1, 8, 8)
    assert next(iter(set_up(tmp_path).val_dataloader()))[0].shape[1:] == (3, 8, 8)


def test_folders_of_splits_stay_and_missing_ones_are_drawn(tmp_path: Path) -> None:
    for k, name in enumerate(("cat", "dog")):
        write(tmp_path / "train" / name, 20, 100 * k)
        write(tmp_path / "validation" / name, 3, 50)
    found = batches(set_up(tmp_path))
    assert {name: len(targets) for name, (_, targets) in found.items()} == {"train": 36, "val": 6, "test": 4}
    assert sorted((found["val"][0][:, 0, 0, 0] * 255).round().tolist()) == [50, 50, 51, 51, 52, 52]


def test_corrupt_images_are_counted_named_and_left_out(root: Path) -> None:
    for name in ("a.png", "b.jpg", "c.gif", "d.png"):
        (root / "cat" / name).write_bytes(b"no image")
    whole = (root / "dog" / "0.png").read_bytes()
    (root / "dog" / "z.png").write_bytes(whole[:-30])
    with pytest.warns(UserWarning, match=r"5 of 65 images .*: cat/a\.png, cat/b\.jpg, .* and 2 more .* left out"):
        data = set_up(root)
    assert sum(len(targets) for _, targets in batches(data).values()) == 60
    with pytest.raises(ValueError, match=r"^5 of 65 images cannot .*data\.max_corrupt=0\.05 of them may be left out"):
        set_up(root, max_corrupt=0.05)


def test_all_images_corrupt_is_refused_whatever_may_be_left_out(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 2 images cannot be decoded: .*No image is left\."):
        set_up(tmp_path, max_corrupt=1.0)


def test_where_images_do_not_fit_damage_is_found_in_headers_or_named_when_read(root: Path) -> None:
    (root / "cat" / "a.png").write_bytes(b"no image")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / "cat" / "b.jpg")
    content = (root / "cat" / "b.jpg").read_bytes()
    (root / "cat" / "b.jpg").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"1 of 62 images cannot be decoded: cat/a\.png "):
        data = set_up(root, memory=0, num_workers=0)
    with pytest.raises(ValueError, match=r"cat/b\.jpg cannot be decoded \(OSError: .*or raise data\.memory"):
        batches(data)


def make(*folders: str) -> Callable[[Path], None]:
    def at(root: Path) -> None:
        for folder in folders:
            if folder.endswith("+"):
                write(root / folder[:-1], 10, 0)
            else:
                (root / folder).mkdir(parents=True)

    return at


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (make(), r"holds no folder\. Each class needs one, with its images\."),
        (make("cat+", "dog"), r"dog holds no image \(\.bmp, .*\)\. Add some, or remove the folder\."),
        (make("cat+"), r"have one class, 'cat', where two are the least"),
        (make("train/cat+", "train/dog+", "test"), r"test holds no image\. Add some, or remove the folder\."),
        (
            make("train/cat+", "train/dog+", "val/dogs+"),
            r"val/dogs is of a class .*no class 'dogs'\. Did you mean 'dog'",
        ),
        (make("val/cat+", "val/dog+"), r"holds 'val' but nothing to train on\. Add 'train'\."),
        (make("train", "test/cat+"), r"train holds no folder"),
    ],
    ids=["empty", "empty class", "one class", "empty split", "untrained class", "no train", "empty train"],
)
def test_folders_that_cannot_be_trained_on_are_refused(
    fill: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match=message):
        set_up(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size must be an integer >= 1, got 0"),
        ({"channels": 4}, ValueError, r"channels must be 1 or 3, got 4"),
        ({"crop_padding": -1}, ValueError, r"crop_padding must be an integer >= 0, got -1"),
        ({"flip": "yes"}, TypeError, r"flip must be True or False, got 'yes'"),
        ({"mean": [0.5]}, TypeError, r"mean must be 3 numbers, one for each channel, got \[0\.5\]"),
        ({"std": [1, 0, 1]}, ValueError, r"std must be 3 numbers > 0, one for each channel, got 0"),
        ({"max_corrupt": 2}, ValueError, r"max_corrupt must be a number in \[0, 1\], got 2"),
        ({"memory": -1}, ValueError, r"memory must be a number >= 0, in MB, got -1"),
        ({"num_workers": -1}, ValueError, r"num_workers must be an integer >= 0, got -1"),
        ({"data_seed": -1}, ValueError, r"data_seed must be an integer in \[0, 2\*\*32\), got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ImageFolderDataModule(tmp_path, **settings)


def test_a_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"root must be a folder .*, got None .*Give data\.root=FOLDER\."):
        ImageFolderDataModule()
    with pytest.raises(FileNotFoundError, match=r"root 'nothing' does not exist"):
        ImageFolderDataModule("nothing")
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match=r"root must be a folder, got the file"):
        set_up(tmp_path / "x")


def test_without_pillow_one_sentence_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"^Reading images needs Pillow: pip install mm-lightning\[report\]\.$"):
        set_up(root)


class Noted(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, float(batch[0].double().sum())))


def network() -> pl.LightningModule:
    return classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), num_classes=3)


@resumes
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("memory", [2000, 0], ids=["held", "read for each batch"])
def test_a_run_resumed_in_mid_epoch_sees_the_same_crops(
    root: Path, memory: float, tmp_path: Path, make_trainer: Callable[..., pl.Trainer]
) -> None:
    settings = {"memory": memory, "num_workers": 0, "crop_padding": 2, "flip": True, "batch_size": 16}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    straight, resumed = Noted(), Noted()
    run = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0}
    make_trainer(straight, saving, **run).fit(network(), set_up(root, **settings))
    data = set_up(root, **settings)
    make_trainer(resumed, **{**run, "enable_checkpointing": False}).fit(
        network(), data, ckpt_path=tmp_path / "step=4.ckpt"
    )
    assert len(straight.seen) == 6
    assert len({total for _, _, total in straight.seen}) == 6
    assert resumed.seen == straight.seen[4:]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "pgm", "tiff"])
def test_images_of_sixteen_bits_keep_their_upper_eight(tmp_path: Path, suffix: str, channels: int) -> None:
    grey = np.array([[0, 255], [25_700, 65_535]], dtype=np.uint16)
    if suffix == "pgm":  # which older versions of Pillow do not write
        (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    expected = torch.tensor([[0, 0], [100, 255]], dtype=torch.uint8).expand(channels, 2, 2)
    assert torch.equal(decode(tmp_path / f"a.{suffix}", 2, channels), expected)


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, kind: Any, mode: str) -> None:
    Image.fromarray(np.ones((2, 2), dtype=kind)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=f"pixels of the mode '{mode}' have no known range"):
        decode(tmp_path / "a.tiff", 2, 1)
