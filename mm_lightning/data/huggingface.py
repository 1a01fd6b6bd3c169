"""A data set of Hugging Face's ``datasets`` on disk as a LightningDataModule."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_flag, no_such, plain
from mm_lightning.data.arrays import existing, put_together, standardized
from mm_lightning.data.image_batches import ImageTransform
from mm_lightning.data.image_files import decode, leave_out_corrupt, pillow, try_each
from mm_lightning.data.image_folder import ImageTensorDataModule
from mm_lightning.data.splits import split_with_names
from mm_lightning.data.tables import Rows, as_inputs

__all__ = ["HuggingFaceDataModule"]


class HuggingFaceDataModule(ImageTensorDataModule):
    """What ``save_to_disk`` of a ``Dataset`` or ``DatasetDict`` has written: images, arrays or columns of numbers.

    Of a ``DatasetDict`` the splits ``train``, ``validation`` and ``test`` are taken; missing ones are drawn from
    ``train``, class by class. All rows are read into memory. Images become batches as those of
    :class:`ImageTensorDataModule`; all else float32 (N, ...).

    Args:
        path: The folder.
        inputs: Name of a column of images or of arrays of one shape, or names of columns of numbers.
        target: Name of the column of labels: a ``ClassLabel``, integers or text.
        standardize: Whether to subtract the training rows' mean and divide by their standard deviation, as
            :class:`ArraysDataModule` does; images are normalised instead.
        settings: Those of :class:`ImageTensorDataModule`.

    Raises:
        FileNotFoundError: If there is no such folder.
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range, or a column not named.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        inputs: str | Sequence[str] | None = None,
        target: str | None = None,
        standardize: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.path = existing("path", path, "a folder that save_to_disk has written", "Give data.path=FOLDER.")
        check_flag("standardize", standardize, "False leaves the numbers as they are.")
        self.inputs: Any = plain(inputs)
        self.target = target
        self.standardize = bool(standardize)
        self._holds_images = False

    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read all rows, as ``load_splits`` of :class:`TensorDataModule` documents it."""
        loaded = _loaded(self.path)
        given = split_with_names(loaded, str(self.path)) if isinstance(loaded, Mapping) else {"train": loaded}
        if not given:
            known = ", ".join(map(repr, loaded))
            raise ValueError(f"{self.path} holds the splits {known}, but no 'train'. Rename one.")
        features = given["train"].features
        columns = self._columns(features)
        self._holds_images = type(features[columns[0]]).__name__ == "Image"
        self.normalization = (self.mean, self.std) if self._holds_images else None
        if self._holds_images and len(columns) > 1:
            raise ValueError(f"inputs must be one column of images, or columns of numbers, got {columns}. Name one.")
        rows = {name: self._rows(split, columns, f"{self.path}, {name}") for name, split in given.items()}
        splits, self.class_names = put_together(rows, str(self.target), self)
        self.num_classes, self.input_shape = len(self.class_names), tuple(splits["train"][0].shape[1:])
        return standardized(splits) if self.standardize and not self._holds_images else splits

    def transform(self, split: str) -> ImageTransform | None:  # type: ignore[override]  # nothing, if no images
        """Crop, flip and normalise images."""
        return super().transform(split) if self._holds_images else None

    def _columns(self, features: Mapping[str, Any]) -> list[str]:
        columns = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        known = ", ".join(features)
        if not columns or self.target is None:
            which = "Which columns hold inputs and labels? Give data.inputs=... and data.target=..."
            raise ValueError(f"{which}, of: {known}.")
        for name in (*columns, self.target):
            if name not in features:
                raise ValueError(f"{no_such(name, features, 'column')} (in {self.path})")
        if self.target in columns:
            raise ValueError(f"The inputs must be columns other than the target {self.target!r}, got {columns}.")
        return list(columns)

    def _rows(self, dataset: Any, columns: list[str], what: str) -> Rows:
        labels = _labels(dataset, str(self.target), what)
        if not self._holds_images:
            return Rows(_numbers(dataset, columns, what), labels)
        images = torch.empty((len(dataset), self.channels, self.size, self.size), dtype=torch.uint8)
        encoded = dataset.cast_column(columns[0], type(dataset.features[columns[0]])(decode=False))
        pillow()  # before each row fails without it

        def read(number: int) -> None:
            content = encoded[number][columns[0]]
            source = content["path"] if content["bytes"] is None else io.BytesIO(content["bytes"])
            with pillow().open(source) as image:
                images[number] = decode(image, self.size, self.channels)

        names = [f"row {number}" for number in range(len(dataset))]
        stay = leave_out_corrupt(names, try_each(read, len(dataset)), self.max_corrupt)
        return Rows(images[stay], labels[stay.numpy()])


def _loaded(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data=hf needs Hugging Face's datasets: pip install mm-lightning[hf].") from error
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        text = f"{path} cannot be loaded ({' '.join(str(error).split())})"
        raise ValueError(f"{text}. Write it with save_to_disk; load_dataset's own cache is not one.") from error


def _labels(dataset: Any, target: str, what: str) -> np.ndarray:
    """The labels; those of a ``ClassLabel`` are its names."""
    labels = list(dataset[target])
    names = getattr(dataset.features[target], "names", None)
    if names is not None:
        if missing := sum(label is None or label < 0 for label in labels):
            raise ValueError(f"{what}: {target} is missing in {missing} of {len(labels)} rows. Leave that split out.")
        labels = [names[label] for label in labels]
    return np.array(labels, dtype=object)


def _numbers(dataset: Any, columns: list[str], what: str) -> Tensor:
    arrays = []
    for name in columns:
        values = list(dataset.with_format(None)[name])
        if missing := sum(value is None for value in values):
            raise ValueError(f"{what}: {name!r} is missing in {missing} rows. Fill them in, or leave the rows out.")
        try:
            array = np.array([np.asarray(value) for value in values])
        except ValueError as error:
            text = f"{what}: the rows of {name!r} have different shapes"
            raise ValueError(f"{text}. Pad or cut them to one before save_to_disk.") from error
        if len(columns) > 1 and array.ndim != 1:
            raise ValueError(f"{what}: of several inputs each must be one number a row, {name!r} is {array.shape}.")
        arrays.append(as_inputs(array, f"{what}: {name!r}"))
    return arrays[0] if arrays[0].dim() > 1 else torch.stack(arrays, dim=1)
