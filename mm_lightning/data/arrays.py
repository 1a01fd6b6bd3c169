"""Arrays and tables of one's own as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_flag, plain, refusal
from mm_lightning.data.labels import check_classes, encode_labels
from mm_lightning.data.splits import check_shares, complete_splits
from mm_lightning.data.tables import Rows, read_npz, read_table
from mm_lightning.data.tensor_data_module import TensorDataModule, seed_of_data

__all__ = ["ArraysDataModule", "existing", "put_together", "standardized"]

_TABLES = (".csv", ".tsv", ".parquet")


class ArraysDataModule(TensorDataModule):
    """Classification data from one file: arrays (``.npz``), or a table (``.csv``, ``.tsv``, ``.parquet``).

    Batches are ``(inputs, targets)``: float32 (N, ...) and class indices int64 (N,). Classes are integers or text, and
    numbered in the order of their names. After ``setup()``, ``num_classes``, ``class_names`` and ``input_shape`` say
    what was read.

    Args:
        path: The file. An ``.npz`` holds inputs and labels under two keys, or under six, one for each split:
            ``x_train``, ``y_train``, ``x_val``, and so on. Tables need pandas: ``pip install mm-lightning[data]``.
        inputs: Key of the inputs in an ``.npz`` (None: ``x``, ``inputs`` or ``X``), or names of the columns of a table
            (None: all but the target).
        target: Key of the labels in an ``.npz`` (None: ``y``, ``targets``, ``target`` or ``labels``), or name of the
            column of a table.
        standardize: Whether to subtract the mean of the training rows and divide by their standard deviation (that of
            constant features counts as 1): of each feature of inputs (N, D), of all numbers of inputs of more
            dimensions.
        val_share: Share of the rows to validate with, in (0, 1), where the file names none; class by class.
        test_share: The same, to test with.
        batch_size: Training rows per batch, on each device.
        eval_batch_size: Rows per batch in validation, test and prediction, on each device.
        seed: Seed of the training order, in [0, 2**32).
        data_seed: Seed of the split alone, so that runs that differ in ``seed`` share their data; None is ``seed``.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range, or the file of another kind.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        inputs: str | Sequence[str] | None = None,
        target: str | None = None,
        standardize: bool = True,
        val_share: float = 0.1,
        test_share: float = 0.1,
        batch_size: int = 100,
        eval_batch_size: int = 1000,
        seed: int = 0,
        data_seed: int | None = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.path = existing("path", path, "a file, .npz, .csv, .tsv or .parquet", "Give data.path=FILE.")
        if self.path.suffix.lower() not in (".npz", *_TABLES):
            kinds = ", ".join((".npz", *_TABLES))
            raise ValueError(f"path must end in one of {kinds}, got {str(path)!r}. np.savez writes the first.")
        check_flag("standardize", standardize, "False leaves the numbers as they are.")
        check_shares(val_share, test_share)
        self.inputs: Any = plain(inputs)
        self.target = target
        self.standardize = bool(standardize)
        self.val_share, self.test_share = val_share, test_share
        self.data_seed = seed_of_data(seed, data_seed)

    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read the file, as ``load_splits`` of :class:`TensorDataModule` documents it."""
        if self.path.suffix.lower() == ".npz":
            if isinstance(self.inputs, list):
                raise refusal("inputs", self.inputs, "one key of an .npz", "Stack the arrays, or give a table.")
            given = read_npz(self.path, self.inputs, self.target)
        else:
            inputs = [self.inputs] if isinstance(self.inputs, str) else self.inputs
            given = read_table(self.path, inputs, self.target)
        splits, self.class_names = put_together(given, self.target or "y", self)
        self.num_classes, self.input_shape = len(self.class_names), tuple(splits["train"][0].shape[1:])
        return standardized(splits) if self.standardize else splits


def put_together(given: Mapping[str, Rows], target: str, settings: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """Number the classes, and take the splits that are not given from the training rows.

    Args:
        given: Rows of each split that there is.
        target: What errors call the labels.
        settings: Has ``val_share``, ``test_share`` and ``data_seed``.

    Returns:
        The three splits, and the names of the classes.
    """
    shapes = {name: tuple(rows.inputs.shape[1:]) for name, rows in given.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The splits have inputs of different shapes: {shapes}. Bring them to one.")
    indices, class_names = encode_labels(np.concatenate([rows.labels for rows in given.values()]), target)
    parts = torch.split(indices, [len(rows.labels) for rows in given.values()])
    targets = dict(zip(given, parts, strict=True))
    check_classes(targets, class_names, "Give rows of each class, or leave the class out.")
    if empty := [name for name, own in targets.items() if not len(own)]:
        raise ValueError(f"The split {empty[0]!r} has no row. Leave it out, and a share of the others is taken.")
    drawn = complete_splits(targets, settings.val_share, settings.test_share, settings.data_seed)
    return {
        name: (given[source].inputs[rows], targets[source][rows]) for name, (source, rows) in drawn.items()
    }, class_names


def existing(name: str, path: Any, expected: str, way_out: str) -> Path:
    """The path, once it is one and is there.

    Raises:
        FileNotFoundError: If it is not there.
        TypeError: If it is none.
    """
    if not isinstance(path, (str, PathLike)):
        raise refusal(name, path, expected, way_out)
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} {str(path)!r} does not exist (from {Path.cwd()}). {way_out}")
    return Path(path)


def standardized(splits: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Subtract the mean of the training inputs from all, and divide by their standard deviation.

    Of each feature of inputs (N, D); of all numbers together of inputs of more dimensions.
    """
    training = splits["train"][0].double()
    of = (0,) if training.dim() == 2 else tuple(range(training.dim()))
    mean, deviation = training.mean(of), training.std(of, correction=0)
    # what rounding leaves of a constant is no spread
    deviation = torch.where(deviation <= 1e-7 * mean.abs(), torch.ones_like(deviation), deviation)
    return {name: (((own.double() - mean) / deviation).float(), targets) for name, (own, targets) in splits.items()}
