"""Data sets in their official files and splits, as images on the trainer's device."""

from __future__ import annotations

import os
from abc import abstractmethod
from os import PathLike
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor

from mm_lightning.arguments import check_count, check_flag, check_integer, refusal
from mm_lightning.data.download import RemoteFile, download, verify
from mm_lightning.data.image_batches import ImageTransform
from mm_lightning.data.splits import split_rows
from mm_lightning.data.tensor_data_module import TensorDataModule, seed_of_data

__all__ = ["Images", "OfficialDataModule"]


class Images(NamedTuple):
    """What is in the files: images uint8 (N, C, H, W), labels int64 (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class OfficialDataModule(TensorDataModule):
    """Images in their official files. A subclass says which these are, and reads them.

    Batches are ``(images, labels)``: float32 (N, C, H, W), normalised, and int64 (N,). Images are held as uint8 on the
    trainer's device. Crops and flips of a training batch are drawn from (seed, epoch, batch, rank) alone, so that a
    resumed epoch repeats them; no global random state is read or moved.

    The files are read where they are, and compared with their SHA-256 each time; of extracted ones only the number of
    images and the range of the labels are looked at.

    With ``num_validation=0`` all official training images are trained on, as in the paper, and *validation sees the
    test images*, so that every epoch has its test accuracy. Then no epoch may be chosen by it: callbacks that would,
    such as a checkpoint of the best, are refused by :meth:`setup`.

    Args:
        root: Folder of the official files, or of the folder that they extract to.
        download: Whether missing files are downloaded into it.
        num_validation: Training images set aside for validation, class by class.
        crop_padding: Black border that training images are randomly cropped from, pixels; 0 does not crop.
        flip: Whether training images are mirrored, left to right, with probability one half.
        batch_size: Training images per batch, on each device.
        eval_batch_size: Images per batch in validation, test and prediction, on each device.
        seed: Seed of the training order, the crops and the flips, in [0, 2**32).
        data_seed: Seed of the split alone, so that runs that differ in ``seed`` share their data; None is ``seed``.
        limit: Keep only the first ``limit`` images of each split, for a quick run. None keeps all.

    Raises:
        FileNotFoundError: If the files are not there and are not to be downloaded.
        ImportError: If a package is missing that they are read with.
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range, or ``root`` a file.
    """

    row_name = "image"
    files: ClassVar[tuple[RemoteFile, ...]]
    extracted: ClassVar[str | None] = None  # the folder in ``root`` that they extract to
    num_classes: int
    num_train: ClassVar[int]  # official training images
    num_test: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]  # of each channel of images in [0, 1]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        root: str | Path | None = None,
        download: bool = False,
        num_validation: int = 5000,
        crop_padding: int = 4,
        flip: bool = True,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        seed: int = 0,
        data_seed: int | None = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check_flag("download", download, "True puts missing files into root.")
        expected = f"an integer in [0, {self.num_train - 1}]"
        check_integer(
            "num_validation", num_validation, expected, lambda count: 0 <= count < self.num_train, "0 trains on all."
        )
        check_count("crop_padding", crop_padding, 0, "0 does not crop.")
        check_flag("flip", flip, "False mirrors no image.")
        if limit is not None:
            check_count("limit", limit, 1, "None keeps all images.")
        if not isinstance(root, (str, PathLike)):
            way_out = f"Give data.root=FOLDER; data.download=true puts them there ({self._megabytes()})."
            raise refusal("root", root, f"the folder of {self._names()}", way_out)
        if Path(root).is_file():
            raise ValueError(
                f"root must be the folder of {self._names()}, got the file {str(root)!r}. Give its folder."
            )
        self.root, self.download = Path(root), bool(download)
        self.num_validation, self.limit = int(num_validation), limit
        self.crop_padding, self.flip = int(crop_padding), bool(flip)
        self.data_seed = seed_of_data(seed, data_seed)
        self.normalization = (self.mean, self.std)
        if not self.download:
            self._check_are_here()
        self.require_packages()  # before a download

    @property
    def validates_on_test(self) -> bool:
        """Whether validation sees the test images."""
        return self.num_validation == 0

    def require_packages(self) -> None:
        """Raise ImportError where a package is missing that the files are read with."""

    @abstractmethod
    def read(self, folder: Path | None) -> Images:
        """Read the images.

        Args:
            folder: The extracted one; None reads the files in ``root``, which have been verified.
        """

    def prepare_data(self) -> None:
        """Download what is missing, if that was asked for; in one process of each machine."""
        if self.download and not self._are_here():
            for file in self.files:
                download(file, self.root)

    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read and verify the files, as ``load_splits`` of :class:`TensorDataModule` documents it."""
        self._check_are_here()
        folder = None if self._files_are_here() or not self.extracted else self.root / self.extracted
        try:
            for file in self.files if folder is None else ():
                verify(file, self.root / file.name)
            data = self.read(folder)
        except OSError as error:
            if error.errno is None:  # a refusal of ours
                raise
            text = f"{error.filename or self.root} cannot be read ({os.strerror(error.errno)})"
            raise OSError(f"{text}. Let this user read it, or give another data.root=FOLDER.") from error
        self._check_counts(data, folder or self.root)
        splits = self._split_up(data)
        return {name: (images[: self.limit], labels[: self.limit]) for name, (images, labels) in splits.items()}

    def setup(self, stage: str | None = None) -> None:
        """Load the data onto the trainer's device; refuse callbacks that would choose an epoch by the test images."""
        for callback in getattr(self.trainer, "callbacks", ()) if stage == "fit" and self.validates_on_test else ():
            monitor = getattr(callback, "wanted", None) or getattr(callback, "monitor", None)
            if monitor is not None and not str(monitor).startswith("train"):
                text = f"num_validation=0 validates on the test images, and {type(callback).__name__} chooses by them"
                raise ValueError(
                    f"{text}. Give data.num_validation=5000, or callbacks=last_epochs, which keeps the last."
                )
        super().setup(stage)

    def transform(self, split: str) -> ImageTransform:
        """Crop, flip and normalise training batches, and normalise all others."""
        if split != "train":
            return ImageTransform(self.mean, self.std)
        return ImageTransform(self.mean, self.std, self.crop_padding, self.flip, self.seed)

    def way_out(self) -> str:
        """What to do where extracted files are not whole; a sentence."""
        return f"Extract it again, or put {self._names()} into {self.root}."

    def _check_counts(self, data: Images, place: Path) -> None:
        parts = {
            "training": (data.train_images, data.train_labels, self.num_train),
            "test": (data.test_images, data.test_labels, self.num_test),
        }
        for name, (images, labels, count) in parts.items():
            if len(images) != count:
                raise ValueError(f"{place} holds {len(images):,} {name} images of {count:,}. {self.way_out()}")
            if (largest := int(labels.max())) >= self.num_classes:
                text = f"{place} holds the label {largest} of a {name} image, where {self.num_classes - 1} is the last"
                raise ValueError(f"{text}. {self.way_out()}")

    def _split_up(self, data: Images) -> dict[str, tuple[Tensor, Tensor]]:
        train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
        if self.validates_on_test:
            return {"train": train, "val": test, "test": test}
        share = self.num_validation / len(data.train_labels)
        rows = split_rows(data.train_labels, {"val": share}, self.data_seed)
        drawn = {name: (data.train_images[own], data.train_labels[own]) for name, own in rows.items()}
        return {**drawn, "test": test}

    def _check_are_here(self) -> None:
        if not self._are_here():
            also = f" (or the folder {self.extracted})" if self.extracted else ""
            raise FileNotFoundError(
                f"root {str(self.root)!r} (from {Path.cwd()}) lacks {self._names()}{also}. Put them there, from "
                f"{' and '.join(file.url for file in self.files)}, or add data.download=true ({self._megabytes()})."
            )

    def _are_here(self) -> bool:
        return self._files_are_here() or (self.extracted is not None and (self.root / self.extracted).is_dir())

    def _files_are_here(self) -> bool:
        return all((self.root / file.name).is_file() for file in self.files)

    def _names(self) -> str:
        return " and ".join(file.name for file in self.files)

    def _megabytes(self) -> str:
        return f"{sum(file.size for file in self.files) / 1e6:.0f} MB"
