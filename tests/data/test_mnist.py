import gzip
import hashlib
import lzma
import random
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.testing import assert_close
from versions import OF_WEIGHTS, resumes

from mm_lightning.data import MNISTDataModule, load_mnist, mnist
from mm_lightning.data.mnist import MNIST, PACKAGED_FILES, SHA256

# Lightning's own warnings about how these tests use it; every other warning stands
pytestmark = [
    pytest.mark.filterwarnings(rf"ignore:{message}")
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        r"`\.fit\(ckpt_path=None\)` was called without a model",
        r"\.fit\(ckpt_path=.last.\) is set, but there is no last checkpoint",
        r"You requested to overfit but enabled (train|val) dataloader shuffling",
    )
]

TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
TEST_LABELS = "t10k-labels-idx1-ubyte"


@lru_cache
def content_of(name: str) -> bytes:
    return lzma.decompress((PACKAGED_FILES / f"{name}.xz").read_bytes())


def pixels_of(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(content_of(name), dtype=np.uint8, offset=16).reshape(-1, 28, 28)


def labels_of(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(content_of(name), dtype=np.uint8, offset=8)


@pytest.fixture(scope="module")
def data() -> MNIST:
    return load_mnist()


@pytest.fixture
def loaded_once(data: MNIST, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let data modules share one copy; the list holds the roots they asked for."""
    roots: list[Any] = []

    def load(root: Any) -> MNIST:
        roots.append(root)
        return data

    monkeypatch.setattr(mnist, "load_mnist", load)
    return roots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of links to the packaged files, to be damaged one by one."""
    for name in SHA256:
        (tmp_path / f"{name}.xz").symlink_to(PACKAGED_FILES / f"{name}.xz")
    return tmp_path


# --- the files -------------------------------------------------------------------------------------------------------


def test_package_is_small_and_carries_its_licence() -> None:
    files = sorted(PACKAGED_FILES.iterdir())
    assert {path.name for path in files} == {"LICENSE", *(f"{name}.xz" for name in SHA256)}
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    text = (PACKAGED_FILES / "LICENSE").read_text()
    assert all(word in text for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "xz", *SHA256.values()))


def test_packaged_files_are_the_official_ones(data: MNIST) -> None:
    for name, expected in SHA256.items():
        assert hashlib.sha256(content_of(name)).hexdigest() == expected
    assert [(field.shape, field.dtype) for field in data] == [
        ((60_000, 28, 28), torch.uint8),
        ((60_000,), torch.int64),
        ((10_000, 28, 28), torch.uint8),
        ((10_000,), torch.int64),
    ]
    assert data.train_labels.bincount().tolist() == TRAIN_COUNTS
    assert data.test_labels.bincount().tolist() == TEST_COUNTS


def test_tensors_hold_the_files_bytes(data: MNIST) -> None:
    np.testing.assert_array_equal(data.train_images.numpy(), pixels_of("train-images-idx3-ubyte"))
    np.testing.assert_array_equal(data.test_images.numpy(), pixels_of("t10k-images-idx3-ubyte"))
    np.testing.assert_array_equal(data.train_labels.numpy(), labels_of("train-labels-idx1-ubyte"))
    np.testing.assert_array_equal(data.test_labels.numpy(), labels_of(TEST_LABELS))


@pytest.mark.parametrize("dots", [False, True], ids=["-idx", ".idx"])
def test_files_in_a_folder_may_be_plain_gz_or_xz(folder: Path, dots: bool, data: MNIST) -> None:
    for name, suffix in zip(SHA256, ("", ".gz", ".xz", ".gz"), strict=True):
        content = content_of(name)
        (folder / f"{name}.xz").unlink()
        stem = name.replace("-idx", ".idx") if dots else name
        pack: dict[str, Callable[[bytes], bytes]] = {
            "": bytes,
            ".gz": lambda content: gzip.compress(content, compresslevel=1),
            ".xz": lambda content: lzma.compress(content, preset=0),
        }
        (folder / f"{stem}{suffix}").write_bytes(pack[suffix](content))
    for own, packaged in zip(load_mnist(str(folder)), data, strict=True):
        assert torch.equal(own, packaged)


def test_flipped_byte_is_refused_with_both_hashes(folder: Path) -> None:
    content = bytearray(content_of(TEST_LABELS))
    content[-1] ^= 1
    (folder / f"{TEST_LABELS}.xz").unlink()
    (folder / TEST_LABELS).write_bytes(content)
    with pytest.raises(ValueError, match="is not the official MNIST file") as refusal:
        load_mnist(folder)
    assert str(refusal.value) == (
        f"{folder / TEST_LABELS} is not the official MNIST file: expected content with SHA-256 {SHA256[TEST_LABELS]},"
        f" got {hashlib.sha256(content).hexdigest()};"
        " replace the file or leave data.root empty to use the packaged copy."
    )


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        pytest.param(".gz", lambda packed: packed[: len(packed) // 2], id="truncated gz"),
        pytest.param(".xz", lambda packed: packed[: len(packed) // 2], id="truncated xz"),
        pytest.param(".gz", lambda packed: b"<html>" + packed, id="gz in name only"),
        pytest.param(".gz", lambda packed: packed[:1000] + b"\0" * 1000 + packed[2000:], id="overwritten gz"),
    ],
)
def test_file_that_does_not_decompress_is_refused(folder: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    pack = gzip.compress if suffix == ".gz" else lzma.compress
    (folder / f"{TEST_LABELS}.xz").unlink()
    path = folder / f"{TEST_LABELS}{suffix}"
    path.write_bytes(damage(pack(content_of(TEST_LABELS))))
    with pytest.raises(ValueError, match="does not decompress") as refusal:
        load_mnist(folder)
    message = str(refusal.value)
    assert message.startswith(f"{path} is damaged: expected content with SHA-256 {SHA256[TEST_LABELS]}, got none")
    assert message.endswith("; replace the file or leave data.root empty to use the packaged copy.")


def test_missing_folder_and_missing_file_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^The MNIST folder .*nowhere does not exist; leave data\.root empty"):
        load_mnist(folder / "nowhere")
    (folder / f"{TEST_LABELS}.xz").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"holds no t10k-labels-idx1-ubyte or t10k-labels\.idx1-ubyte \(plain, \.gz or \.xz\); .* data\.root",
    ):
        load_mnist(folder)


def test_damaged_installation_asks_for_a_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{TEST_LABELS}.xz").unlink()
    monkeypatch.setattr(mnist, "PACKAGED_FILES", folder)
    for root in (None, ""):
        with pytest.raises(FileNotFoundError, match=r"install mm-lightning again\.$"):
            load_mnist(root)


# --- the data module, without a trainer ------------------------------------------------------------------------------


def test_split_positions_and_values() -> None:
    datamodule = MNISTDataModule()
    datamodule.setup()
    pixels, labels = pixels_of("train-images-idx3-ubyte"), labels_of("train-labels-idx1-ubyte")
    parts = {
        "train": (datamodule.train_dataloader(), pixels[:50_000], labels[:50_000]),
        "val": (datamodule.val_dataloader(), pixels[50_000:], labels[50_000:]),
        "test": (datamodule.test_dataloader(), pixels_of("t10k-images-idx3-ubyte"), labels_of(TEST_LABELS)),
        "predict": (datamodule.predict_dataloader(), pixels_of("t10k-images-idx3-ubyte"), labels_of(TEST_LABELS)),
    }
    for loader, expected_pixels, expected_labels in parts.values():
        images, targets = loader.tensors
        assert (images.dtype, images.shape[1:], targets.dtype) == (torch.float32, (1, 28, 28), torch.int64)
        expected = expected_pixels.astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(images.squeeze(1).numpy(), expected)
        np.testing.assert_array_equal(targets.numpy(), expected_labels)
    assert [len(loader) for loader, *_ in parts.values()] == [500, 10, 10, 10]
    first_images, first_labels = next(iter(datamodule.test_dataloader()))
    assert first_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert_close(first_images.amax(), torch.tensor(1.0), rtol=0, atol=0)


@pytest.mark.usefixtures("loaded_once")
def test_only_training_is_shuffled_and_the_pairs_stay_together(data: MNIST) -> None:
    datamodule = MNISTDataModule(batch_size=7, eval_batch_size=7, limit=20)
    datamodule.setup()
    labels = torch.cat([labels for _, labels in datamodule.train_dataloader()])
    sums = torch.cat([images.double().sum((1, 2, 3)) for images, _ in datamodule.train_dataloader()])
    order = list(datamodule.train_dataloader().sampler)
    assert order != sorted(order)
    assert torch.equal(labels, data.train_labels[order])
    assert_close(sums, data.train_images[order].double().sum((1, 2)) / 255, rtol=1e-6, atol=0)
    val_labels = torch.cat([labels for _, labels in datamodule.val_dataloader()])
    assert torch.equal(val_labels, data.train_labels[50_000:50_020])


@pytest.mark.usefixtures("loaded_once")
def test_num_validation_and_limit_cut_the_official_order(data: MNIST) -> None:
    datamodule = MNISTDataModule(num_validation=100, limit=30)
    datamodule.setup()
    assert torch.equal(datamodule.train_dataloader().tensors[1], data.train_labels[:30])
    assert torch.equal(datamodule.val_dataloader().tensors[1], data.train_labels[59_900:59_930])
    assert torch.equal(datamodule.test_dataloader().tensors[1], data.test_labels[:30])
    without_validation = MNISTDataModule(num_validation=0, limit=30)
    without_validation.setup()
    assert torch.equal(without_validation.train_dataloader().tensors[1], data.train_labels[:30])
    assert len(without_validation.val_dataloader()) == 0


@pytest.mark.usefixtures("loaded_once")
def test_training_order_follows_the_seed() -> None:
    def labels(seed: int) -> list[int]:
        datamodule = MNISTDataModule(seed=seed, limit=100)
        datamodule.setup()
        return next(iter(datamodule.train_dataloader()))[1].tolist()

    assert labels(seed=1) == labels(seed=1)
    assert labels(seed=1) != labels(seed=2)


def test_data_is_loaded_once(loaded_once: list[Any]) -> None:
    datamodule = MNISTDataModule(root="somewhere", limit=30)
    datamodule.setup("fit")
    images = datamodule.train_dataloader().tensors[0]
    datamodule.setup("test")
    assert loaded_once == ["somewhere"]
    assert datamodule.train_dataloader().tensors[0].data_ptr() == images.data_ptr()


@pytest.mark.usefixtures("loaded_once")
def test_global_random_state_is_neither_read_nor_moved() -> None:
    def read() -> list[list[int]]:
        datamodule = MNISTDataModule(limit=100, batch_size=30)
        datamodule.setup()
        loaders = [datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()]
        return [labels.tolist() for loader in loaders for _, labels in loader]

    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    try:
        first = read()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert repr(np.random.get_state()) == states[1]  # noqa: NPY002
        assert random.getstate() == states[2]
        torch.rand(1)
        assert read() == first
    finally:
        torch.set_rng_state(states[0])


def test_reading_emits_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datamodule = MNISTDataModule(limit=30)
        datamodule.setup()
        assert len(list(datamodule.train_dataloader())) == 1


def test_classes_are_the_digits() -> None:
    assert MNISTDataModule().num_classes == 10
    assert MNISTDataModule().class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch_size must be an integer >= 1, got 0\."):
        MNISTDataModule(batch_size=0)
    with pytest.raises(ValueError, match=r"^eval_batch_size must be an integer >= 1, got 0\."):
        MNISTDataModule(eval_batch_size=0)
    for num_validation in (-1, 60_000):
        with pytest.raises(
            ValueError, match=rf"^num_validation must be an integer in \[0, 59999\], got {num_validation}\."
        ):
            MNISTDataModule(num_validation=num_validation)
    with pytest.raises(ValueError, match=r"^limit must be an integer >= 1, got 0\."):
        MNISTDataModule(limit=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": 3}, "a folder, got 3 of type int. Leave it empty to use the packaged copy."),
        ({"batch_size": "8"}, "an integer >= 1, got '8' of type str. 1 yields single images."),
        ({"eval_batch_size": 8.0}, "an integer >= 1, got 8.0 of type float. 1 yields single images."),
        ({"num_validation": True}, "an integer in [0, 59999], got True of type bool. 0 trains on all 60,000."),
        ({"seed": "a"}, "an integer in [0, 2**32), got 'a' of type str. Give 0, for example."),
        ({"limit": 10.5}, "an integer >= 1, got 10.5 of type float. None keeps all images."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as refusal:
        MNISTDataModule(**arguments)
    assert str(refusal.value) == f"{next(iter(arguments))} must be {message}"


def test_loader_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"holds no data yet\. Call setup\(\)"):
        MNISTDataModule().train_dataloader()


def test_messages_of_the_common_part_speak_of_mnist() -> None:
    with pytest.raises(ValueError, match=r"^batch_size must be .* 1 yields single images\.$"):
        MNISTDataModule(batch_size=0)
    with pytest.raises(RuntimeError, match=r"^MNISTDataModule holds no data yet\. Call setup\(\) before asking"):
        MNISTDataModule().test_dataloader()


# --- under a trainer -------------------------------------------------------------------------------------------------

NUM_BATCHES = 8


class Recorder(LightningModule):
    """A linear classifier that notes each batch as (epoch, batch_idx, pixel sums) and can fail at one of them."""

    def __init__(self, fail_at: tuple[int, int] | None = None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.fail_at = fail_at
        self.error = error
        self.seen: list[tuple[int, int, list[float]]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if (self.current_epoch, batch_idx) == self.fail_at:
            raise self.error("stopped by the test")
        self.seen.append((self.current_epoch, batch_idx, images.sum((1, 2, 3)).tolist()))
        return nn.functional.cross_entropy(self.linear(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluated += batch[1].tolist()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluated += batch[1].tolist()

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return batch[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0, "enable_checkpointing": bool(callbacks)}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | settings,
    )


def make_datamodule(**settings: Any) -> MNISTDataModule:
    return MNISTDataModule(**{"batch_size": 8, "limit": 8 * NUM_BATCHES - 3} | settings)


def assert_resumes_like(straight: Recorder, checkpoint: Path, num_done: int, folder: Path, **settings: Any) -> None:
    resumed = Recorder()
    trainer = make_trainer(folder, **settings)
    trainer.fit(resumed, datamodule=make_datamodule(), ckpt_path=checkpoint, **OF_WEIGHTS)
    assert resumed.seen == straight.seen[num_done:]
    assert trainer.global_step == len(straight.seen)
    assert torch.equal(resumed.linear.weight, straight.linear.weight)
    assert torch.equal(resumed.linear.bias, straight.linear.bias)


@pytest.mark.usefixtures("loaded_once")
def test_each_epoch_sees_each_image_once_in_a_new_order(tmp_path: Path) -> None:
    module, datamodule = Recorder(), make_datamodule()
    make_trainer(tmp_path).fit(module, datamodule=datamodule)
    assert [seen[:2] for seen in module.seen] == [(epoch, batch) for epoch in range(3) for batch in range(NUM_BATCHES)]
    epochs = [[value for epoch, _, sums in module.seen if epoch == number for value in sums] for number in range(3)]
    assert len(epochs[0]) == 8 * NUM_BATCHES - 3
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    # the trainer's position belongs to the fit; a loader iterated by hand afterwards is whole
    assert len(list(datamodule.train_dataloader())) == NUM_BATCHES


@pytest.mark.usefixtures("loaded_once")
def test_evaluation_sees_the_sets_in_order(tmp_path: Path, data: MNIST) -> None:
    module, datamodule = Recorder(), make_datamodule(eval_batch_size=25)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, datamodule=datamodule)
    assert module.evaluated == data.train_labels[50_000:50_061].tolist()
    module.evaluated.clear()
    trainer.test(module, datamodule=datamodule)
    assert module.evaluated == data.test_labels[:61].tolist()
    predicted = trainer.predict(module, datamodule=datamodule)
    assert [label for labels in predicted or [] for label in labels.tolist()] == data.test_labels[:61].tolist()  # type: ignore[union-attr]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("when", "settings", "steps"),
    [
        pytest.param({"every_n_train_steps": 5}, {}, [5, 10, 15, 20], id="mid-epoch", marks=resumes),
        pytest.param(
            {"every_n_train_steps": 5},
            {"max_epochs": -1, "max_steps": 24},
            [5, 10],
            id="mid-epoch, max_steps",
            marks=resumes,
        ),
        pytest.param({"every_n_train_steps": 8}, {}, [8, 16], id="last batch", marks=resumes),
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}, [8, 16], id="epoch end"),
        pytest.param(
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            {"limit_val_batches": 1, "num_sanity_val_steps": 0},
            [8, 16],
            id="validation at epoch end",
        ),
        pytest.param(
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            {"limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 3},
            [3, 6, 11, 14, 19],
            id="validation mid-epoch",
            marks=resumes,
        ),
        pytest.param(
            {"every_n_train_steps": 5},
            {"reload_dataloaders_every_n_epochs": 1},
            [5, 15],
            id="reloaded loader",
            marks=resumes,
        ),
    ],
)
def test_resumed_run_equals_the_straight_run(
    tmp_path: Path, when: dict[str, Any], settings: dict[str, Any], steps: list[int]
) -> None:
    straight = Recorder()
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    make_trainer(tmp_path, saving, **settings).fit(straight, datamodule=make_datamodule())
    assert len(straight.seen) == 3 * NUM_BATCHES
    for step in steps:
        assert_resumes_like(straight, tmp_path / f"step={step}.ckpt", step, tmp_path, **settings)


@resumes
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("callback", "fail_at"),
    [
        (OnExceptionCheckpoint, (0, 0)),
        (OnExceptionCheckpoint, (1, 0)),
        (OnExceptionCheckpoint, (1, 7)),
        (OnExceptionCheckpoint, (2, 5)),
        (ModelCheckpoint, (0, 3)),  # it saves nothing before step 1
        (ModelCheckpoint, (1, 5)),
    ],
)
def test_run_resumed_after_an_exception_equals_the_straight_run(
    tmp_path: Path, callback: Callable[..., Callback], fail_at: tuple[int, int]
) -> None:
    straight = Recorder()
    make_trainer(tmp_path).fit(straight, datamodule=make_datamodule())
    saving = callback(tmp_path, **({"save_on_exception": True} if callback is ModelCheckpoint else {}))
    failing = Recorder(fail_at)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        make_trainer(tmp_path, saving).fit(failing, datamodule=make_datamodule())
    num_done = NUM_BATCHES * fail_at[0] + fail_at[1]
    assert failing.seen == straight.seen[:num_done]
    checkpoint = max(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    assert_resumes_like(straight, checkpoint, num_done, tmp_path)


@pytest.mark.usefixtures("loaded_once")
def test_resuming_with_another_batch_size_is_refused(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    make_trainer(tmp_path, saving, max_epochs=1).fit(Recorder(), datamodule=make_datamodule())
    with pytest.raises(ValueError, match=r"'batch_size': 8, .*'batch_size': 4, .* would repeat or skip samples"):
        make_trainer(tmp_path).fit(
            Recorder(), datamodule=make_datamodule(batch_size=4), ckpt_path=tmp_path / "step=5.ckpt"
        )


@pytest.mark.usefixtures("loaded_once")
def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    module = Recorder()
    make_trainer(tmp_path, overfit_batches=2).fit(module, datamodule=make_datamodule())
    batches = [sums for _, _, sums in module.seen]
    assert len(batches) == 6
    assert batches[:2] == batches[2:4] == batches[4:]


@pytest.mark.usefixtures("loaded_once")
def test_ranks_of_the_trainer_partition_the_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, datamodule = make_trainer(tmp_path), make_datamodule(limit=40)
    datamodule.trainer = trainer
    datamodule.setup("fit")
    monkeypatch.setattr(Trainer, "world_size", 2)
    orders = []
    for rank in (0, 1):
        monkeypatch.setattr(Trainer, "global_rank", rank)
        orders.append(list(datamodule.train_dataloader().sampler))
        assert [len(labels) for _, labels in datamodule.train_dataloader()] == [8, 8, 4]
    assert sorted(orders[0] + orders[1]) == list(range(40))


@pytest.mark.usefixtures("loaded_once")
def test_setup_puts_the_tensors_on_the_trainers_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, datamodule = make_trainer(tmp_path), make_datamodule()
    # any device but the CPU will do
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("meta"))
    datamodule.trainer = trainer
    datamodule.setup("fit")
    assert {tensor.device.type for tensor in datamodule.train_dataloader().tensors} == {"meta"}
