"""Class labels of one's own data, integers or text, as indices 0 to K - 1; and what is refused of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_classes", "encode_labels"]


def encode_labels(labels: Any, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Number the classes in the order of their names: text sorted as text, integers as numbers.

    Args:
        labels: Integers, truth values or text, (N,).
        name: What errors call them.

    Returns:
        Indices int64 (N,), and the names of the K classes.

    Raises:
        TypeError: If they are neither, floating point numbers among others.
        ValueError: If one is missing, they are no single column, or there is none.

    Example:
        >>> encode_labels(["dog", "cat", "dog"], "animal")
        (tensor([1, 0, 1]), ('cat', 'dog'))
    """
    array = np.asarray(labels)
    if array.ndim != 1:
        way_out = "Give class indices; of one-hot rows those are argmax(axis=1)."
        raise ValueError(f"{name} must hold one label for each row, got the shape {array.shape}. {way_out}")
    if not len(array):
        raise ValueError(f"{name} holds no label. Give data with at least two classes.")
    if array.dtype == object:
        array = _of_one_type(array, name)
    if array.dtype.kind == "f" and (missing := int(np.isnan(array).sum())):
        raise ValueError(f"{name} is missing in {missing} of {len(array)} rows. Fill them in, or leave the rows out.")
    if array.dtype.kind not in "iubUS":
        way_out = "Convert whole numbers with astype(int); other numbers are no classes."
        raise TypeError(f"{name} must be integers or text, got {array[0]} of type {array.dtype}. {way_out}")
    names, indices = np.unique(array, return_inverse=True)
    if array.dtype.kind == "S":
        names = np.char.decode(names, "utf-8")
    return torch.from_numpy(indices.astype(np.int64)), tuple(map(str, names))


def check_classes(splits: Mapping[str, Tensor], class_names: Sequence[str], way_out: str) -> None:
    """Refuse data of one class, and data with a class that no training row has.

    Args:
        splits: Class indices of each split, ``"train"`` among them.
        class_names: Names by class index.
        way_out: A sentence.

    Raises:
        ValueError: If it is one of these.
    """
    if len(class_names) < 2:
        raise ValueError(f"The data have one class, {class_names[0]!r}, where two are the least. {way_out}")
    rows = torch.bincount(splits["train"], minlength=len(class_names)).tolist()
    if missing := [name for name, count in zip(class_names, rows, strict=True) if not count]:
        raise ValueError(f"No training row has the class {', '.join(map(repr, missing[:5]))}. {way_out}")


def _of_one_type(array: np.ndarray, name: str) -> np.ndarray:
    missing = sum(label is None or label != label for label in array)
    if missing:
        raise ValueError(f"{name} is missing in {missing} of {len(array)} rows. Fill them in, or leave the rows out.")
    kinds = {type(label).__name__ for label in array}
    if len(kinds) > 1:
        raise TypeError(f"{name} mixes the types {', '.join(sorted(kinds))}. Convert all labels to one of them.")
    return np.array(array.tolist())
