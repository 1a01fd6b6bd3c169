"""Folders of images, one for each class, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_lightning.arguments import check_count, check_flag, check_integer, check_number, plain, refusal
from mm_lightning.data.arrays import existing
from mm_lightning.data.image_batches import ImageTransform, WorkerBatches
from mm_lightning.data.image_files import (
    class_folders,
    decode,
    find_images,
    leave_out_corrupt,
    pillow,
    read_header,
    try_each,
)
from mm_lightning.data.labels import check_classes
from mm_lightning.data.splits import check_shares, complete_splits, split_with_names
from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.data.tensor_data_module import TensorDataModule, seed_of_data

__all__ = ["ImageFolderDataModule", "ImageTensorDataModule"]

# Of ImageNet, in RGB, which pretrained networks have seen; and of the three channels together.
_MEAN = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
_STD = {3: (0.229, 0.224, 0.225), 1: (0.226,)}


class ImageTensorDataModule(TensorDataModule):
    """Images of one size, held as uint8; batches are cropped, flipped and normalised on the device.

    Args:
        size: Height and width that images are resized to, pixels.
        channels: 3 for RGB, 1 for grey.
        crop_padding: Black border that training images are randomly cropped from, pixels; 0 does not crop.
        flip: Whether training images are mirrored, left to right, with probability one half.
        mean: Mean of each channel of images in [0, 1]; None is ImageNet's.
        std: Standard deviation of each.
        val_share: Share of the training images to validate with, in (0, 1), where there is no such split.
        test_share: The same, to test with.
        max_corrupt: Share of images that may be left out, in [0, 1], because they cannot be decoded.
        batch_size: Training images per batch, on each device.
        eval_batch_size: Images per batch in validation, test and prediction, on each device.
        seed: Seed of the training order, the crops and the flips, in [0, 2**32).
        data_seed: Seed of the split alone, so that runs that differ in ``seed`` share their data; None is ``seed``.
    """

    row_name = "image"

    def __init__(
        self,
        size: int = 64,
        channels: int = 3,
        crop_padding: int = 4,
        flip: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        max_corrupt: float = 0.1,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        seed: int = 0,
        data_seed: int | None = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check_count("size", size, 1, "64 makes 64 x 64 pixels.")
        check_integer("channels", channels, "1 or 3", lambda count: count in (1, 3), "1 is grey, 3 is RGB.")
        check_count("crop_padding", crop_padding, 0, "0 does not crop.")
        check_flag("flip", flip, "False mirrors no image.")
        check_shares(val_share, test_share)
        none_at_all = "0 refuses the first."
        check_number("max_corrupt", max_corrupt, "a number in [0, 1]", lambda share: 0 <= share <= 1, none_at_all)
        self.size, self.channels = int(size), int(channels)
        self.crop_padding, self.flip = int(crop_padding), bool(flip)
        self.mean = _of_channels("mean", mean, _MEAN[channels], least=float("-inf"))
        self.std = _of_channels("std", std, _STD[channels], least=0.0)
        self.val_share, self.test_share, self.max_corrupt = val_share, test_share, max_corrupt
        self.data_seed = seed_of_data(seed, data_seed)
        self.input_shape = (self.channels, self.size, self.size)
        self.normalization = (self.mean, self.std)

    def transform(self, split: str) -> ImageTransform:
        """Crop, flip and normalise training batches, and normalise all others."""
        if split != "train":
            return ImageTransform(self.mean, self.std)
        return ImageTransform(self.mean, self.std, self.crop_padding, self.flip, self.seed)


class ImageFolderDataModule(ImageTensorDataModule):
    """Images in folders named for their classes: ``root/train/cat/1.png``, or ``root/cat/1.png`` without splits.

    A folder ``val`` (``valid``, ``validation``) or ``test`` beside ``train`` is that split; the others are drawn from
    the training images, class by class. Batches are ``(images, targets)``: float32 (N, C, size, size) and int64 (N,).
    Classes are numbered in the order of their names. Files that cannot be decoded are left out with a warning that
    counts and names them.

    All images are decoded once where they fit into ``memory`` as uint8. Else workers decode them for each batch: then
    only the files' headers are looked at beforehand, and a file that is damaged further on stops the run by its name.

    Args:
        root: The folder.
        memory: MB that decoded images may take up in each process; 0 reads them in workers.
        num_workers: Processes that read images that do not fit; None is up to four, 0 reads in the process itself.
        settings: Those of :class:`ImageTensorDataModule`.

    Raises:
        FileNotFoundError: If there is no such folder.
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    def __init__(
        self, root: str | Path | None = None, memory: float = 2000, num_workers: int | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.root = existing("root", root, "a folder with a folder of images for each class", "Give data.root=FOLDER.")
        check_number("memory", memory, "a number >= 0, in MB", lambda number: number >= 0, "0 keeps no image.")
        if num_workers is not None:
            check_count("num_workers", num_workers, 0, "0 starts none.")
        self.memory, self.num_workers = memory, num_workers
        self._files: list[Path] = []

    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read the images or, where they do not fit, number them: then those numbers are the splits' inputs."""
        if not self.root.is_dir():
            raise ValueError(f"root must be a folder, got the file {str(self.root)!r}. Give the folder of the classes.")
        folders = {path.name: path for path in class_folders(self.root)}
        of_splits = split_with_names(folders, str(self.root)) or {"train": self.root}
        self.class_names = tuple(path.name for path in class_folders(of_splits["train"]))
        self.num_classes = len(self.class_names)
        if not self.class_names:
            raise ValueError(f"{of_splits['train']} holds no folder. Each class needs one, with its images.")
        found = {name: find_images(folder, self.class_names) for name, folder in of_splits.items()}
        if empty := [name for name, (files, _) in found.items() if not files]:
            raise ValueError(f"{of_splits[empty[0]]} holds no image. Add some, or remove the folder.")
        self._files = [file for files, _ in found.values() for file in files]
        images, kept = self._read()
        targets, numbers, begin = {}, {}, 0
        for name, (files, own) in found.items():
            stay = kept[(kept >= begin) & (kept < begin + len(files))]
            numbers[name], targets[name] = stay, own[stay - begin]
            begin += len(files)
        check_classes(targets, self.class_names, f"Add folders of images to {of_splits['train']}.")
        drawn = complete_splits(targets, self.val_share, self.test_share, self.data_seed)
        rows = {name: (numbers[source][own], targets[source][own]) for name, (source, own) in drawn.items()}
        return rows if images is None else {name: (images[own], targets) for name, (own, targets) in rows.items()}

    def make_batches(self, inputs: Tensor, targets: Tensor, **settings: Any) -> TensorBatches:
        """Cut the images into batches, or have workers read those of each."""
        if inputs.dim() > 1:
            return super().make_batches(inputs, targets, **settings)
        read_image = partial(_read_image, self._files, self.size, self.channels)
        return WorkerBatches([inputs, targets], read_image, self.num_workers, **settings)

    def _read(self) -> tuple[Tensor | None, Tensor]:
        """All images, if they fit, and the numbers of those that can be read."""
        pillow()  # before each file fails without it
        shape = (len(self._files), self.channels, self.size, self.size)
        if torch.Size(shape).numel() > self.memory * 1e6:
            images, corrupt = None, try_each(lambda number: read_header(self._files[number]), len(self._files))
        else:
            images = torch.empty(shape, dtype=torch.uint8)

            def read(number: int) -> None:
                images[number] = decode(self._files[number], self.size, self.channels)

            corrupt = try_each(read, len(self._files))
        names = [str(file.relative_to(self.root)) for file in self._files]
        return images, leave_out_corrupt(names, corrupt, self.max_corrupt)


def _read_image(files: Sequence[Path], size: int, channels: int, number: int) -> Tensor | str:
    try:
        return decode(files[number], size, channels)
    except Exception as error:  # whatever a decoder meets in a damaged file
        text = f"{files[number]} cannot be decoded ({type(error).__name__}: {error})"
        return f"{text}. Replace or remove it; or raise data.memory, and such files are left out."


def _of_channels(name: str, value: Any, default: tuple[float, ...], least: float) -> tuple[float, ...]:
    numbers = default if value is None else plain(value)
    expected = f"{len(default)} numbers{' > 0' if least == 0 else ''}, one for each channel"
    if not isinstance(numbers, (list, tuple)) or len(numbers) != len(default):
        raise refusal(name, value, expected, "None is ImageNet's.")
    for number in numbers:
        check_number(name, number, expected, lambda number: number > least, "None is ImageNet's.")
    return tuple(map(float, numbers))
