"""MNIST: the packaged files, verified, and a LightningDataModule with the data on the trainer's device."""

import gzip
import hashlib
import lzma
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mm_lightning.arguments import check_count, check_integer, refusal
from mm_lightning.data.tensor_data_module import TensorDataModule

PACKAGED_FILES = Path(__file__).with_name("mnist_files")

# SHA-256 of the official IDX files, decompressed, in the order of MNIST's fields
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNIST(NamedTuple):
    """The official data: images uint8 (N, 28, 28), labels int64 (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_mnist(root: str | Path | None = None) -> MNIST:
    """Read the four IDX files and verify their SHA-256.

    Args:
        root: Folder with the official files, named ``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte`` and so
            on, each plain, ``.gz`` or ``.xz``. Left empty, the packaged copy is read.

    Returns:
        60,000 training and 10,000 test images with their labels, in the official order.

    Raises:
        FileNotFoundError: If the folder or one of the files is missing.
        ValueError: If a file does not decompress or is not the official one.
    """
    folder = Path(root) if root else PACKAGED_FILES
    way_out = "leave data.root empty to use the packaged copy" if root else "install mm-lightning again"
    paths = [_find(folder, name, way_out) for name in SHA256]
    with ThreadPoolExecutor() as pool:  # lzma, zlib and hashlib release the GIL
        contents = list(pool.map(_read_verified, paths, SHA256.values(), [way_out] * len(paths)))
    train_images, train_labels, test_images, test_labels = map(_parse_idx, contents)
    return MNIST(train_images, train_labels.long(), test_images, test_labels.long())


class MNISTDataModule(TensorDataModule):
    """MNIST in its official split, held as tensors on the trainer's device.

    Batches are ``(images, labels)``: float32 (N, 1, 28, 28) in [0, 1] and int64 (N,). The last ``num_validation``
    training images are the validation set; ``predict`` sees the test set. The training order is a function of
    ``seed`` and the epoch alone, and a resumed epoch continues with the batch at which it stopped.

    Args:
        root: Folder of the IDX files (see ``load_mnist``). Left empty, the packaged copy is read.
        batch_size: Training images per batch, on each device.
        eval_batch_size: Images per batch in validation, test and prediction, on each device.
        num_validation: Training images set aside for validation, 0 to 59,999.
        seed: Seed of the training order, in [0, 2**32).
        limit: Keep only the first ``limit`` images of the training, the validation and the test set, for a quick
            run. Empty keeps all.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    num_classes = 10
    class_names = tuple("0123456789")
    input_shape = (1, 28, 28)
    normalization = ((0.0,), (1.0,))
    row_name = "image"

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 100,
        eval_batch_size: int = 1000,
        num_validation: int = 10_000,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if root is not None and not isinstance(root, (str, PathLike)):
            raise refusal("root", root, "a folder", "Leave it empty to use the packaged copy.")
        check_integer(
            "num_validation",
            num_validation,
            "an integer in [0, 59999]",
            lambda count: 0 <= count < 60_000,
            "0 trains on all 60,000.",
        )
        if limit is not None:
            check_count("limit", limit, 1, "None keeps all images.")
        self.root = root
        self.num_validation = num_validation
        self.limit = limit

    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read the files, as ``load_splits`` of :class:`TensorDataModule` documents it."""
        data = load_mnist(self.root)
        num_train = len(data.train_images) - self.num_validation
        splits = {
            "train": (data.train_images[:num_train], data.train_labels[:num_train]),
            "val": (data.train_images[num_train:], data.train_labels[num_train:]),
            "test": (data.test_images, data.test_labels),
        }
        return {
            name: (_to_unit_range(images[: self.limit]), labels[: self.limit])
            for name, (images, labels) in splits.items()
        }


def _find(folder: Path, name: str, way_out: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"The MNIST folder {folder} does not exist; {way_out}.")
    stems = (name, name.replace("-idx", ".idx"))
    for file_name in (stem + suffix for suffix in ("", ".gz", ".xz") for stem in stems):
        if (path := folder / file_name).is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no {' or '.join(stems)} (plain, .gz or .xz); add the file or {way_out}.")


def _read_verified(path: Path, expected: str, way_out: str) -> bytes:
    try:
        content = _decompress(path)
        found = hashlib.sha256(content).hexdigest()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged: expected content with SHA-256 {expected}, got none, for it does not decompress"
            f" ({error}); replace the file or {way_out}."
        ) from error
    if found != expected:
        raise ValueError(
            f"{path} is not the official MNIST file: expected content with SHA-256 {expected}, got {found};"
            f" replace the file or {way_out}."
        )
    return content


def _decompress(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _parse_idx(content: bytes) -> Tensor:
    # IDX, big-endian: two zero bytes, the type (0x08 is uint8), the number of dimensions, one uint32 for each
    zeros, dtype, ndim = struct.unpack_from(">HBB", content)
    assert (zeros, dtype) == (0, 0x08)  # verified content
    shape = struct.unpack_from(f">{ndim}I", content, offset=4)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * ndim).reshape(shape)


def _to_unit_range(images: Tensor) -> Tensor:
    # (N, 28, 28) -> (N, 1, 28, 28); on the CPU, since CUDA divides by a constant with another rounding
    return images.unsqueeze(1).float().div_(255)
