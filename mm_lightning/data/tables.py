"""Inputs and labels from files of arrays (``.npz``) and tables (``.csv``, ``.tsv``, ``.parquet``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import no_such
from mm_lightning.data.splits import SPLIT_NAMES, split_with_names

__all__ = ["Rows", "as_inputs", "read_npz", "read_table"]

_INPUTS, _TARGETS = ("x", "inputs", "X"), ("y", "targets", "target", "labels")


class Rows(NamedTuple):
    """Inputs float32 (N, ...), and labels (N,) as they stand in the file."""

    inputs: Tensor
    labels: np.ndarray


def read_npz(path: Path, inputs: str | None, target: str | None) -> dict[str, Rows]:
    """Read the arrays of each split that is there: ``x_train``, ``y_train``, ``x_val``, ...; or ``x`` and ``y``.

    Args:
        path: An ``.npz`` file without pickled objects.
        inputs: Key of the inputs; None is the one that is there of ``x``, ``inputs`` and ``X``.
        target: Key of the labels; None is the one that is there of ``y``, ``targets``, ``target`` and ``labels``.

    Returns:
        The rows under ``"train"`` and, where given, ``"val"`` and ``"test"``.

    Raises:
        ValueError: If the file is none, a key is not there, lengths differ or an input is not a finite number.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, AttributeError) as error:
        way_out = "Write it with np.savez(path, x=..., y=...)."
        raise ValueError(f"{path} cannot be read as .npz ({error}). {way_out}") from error
    found = {kind: _by_split(arrays, key, names, path) for kind, (key, names) in _kinds(inputs, target).items()}
    if set(found["inputs"]) != set(found["target"]):
        splits = [", ".join(of_one) for of_one in found.values()]
        raise ValueError(f"{path} holds inputs of {splits[0]} but labels of {splits[1]}. Give both of each split.")
    rows = {}
    for split, key in found["inputs"].items():
        target_key = found["target"][split]
        values, labels = arrays[key], arrays[target_key]
        if values.ndim < 2:
            raise ValueError(f"{path}: {key} must be (N, ...), a row for each label, got the shape {values.shape}.")
        if len(values) != len(labels):
            raise ValueError(f"{path}: {key} has {len(values)} rows, {target_key} has {len(labels)}. Each needs one.")
        rows[split] = Rows(as_inputs(values, f"{path}: {key}"), labels)
    return rows


def read_table(path: Path, inputs: Sequence[str] | None, target: str | None) -> dict[str, Rows]:
    """Read the columns of a CSV, TSV or Parquet file.

    Args:
        path: The file. The first row of CSV and TSV names the columns.
        inputs: Names of the columns that are the inputs; None is all but the target.
        target: Name of the column of labels.

    Returns:
        All rows, under ``"train"``.

    Raises:
        ImportError: Without pandas or, for Parquet, pyarrow.
        TypeError: If an input column is no column of numbers.
        ValueError: If the file is none, a column is not there, or a value is missing.
    """
    frame = _frame(path)
    names = [str(name) for name in frame.columns]
    if target is None:
        raise ValueError(f"Which column of {path} holds the classes? Give data.target=..., one of: {', '.join(names)}.")
    columns = [name for name in names if name != target] if inputs is None else list(inputs)
    for name in (target, *columns):
        if name not in names:
            raise ValueError(f"{no_such(name, names, 'column')} (in {path})")
    if target in columns or not columns:
        raise ValueError(f"The inputs must be columns other than the target {target!r}, got {columns}.")
    missing = {name: int(count) for name in (*columns, target) if (count := frame[name].isna().sum())}
    if missing:
        counts = ", ".join(f"{name!r} in {count}" for name, count in list(missing.items())[:5])
        more = f" (and {len(missing) - 5} more columns)" if len(missing) > 5 else ""
        way_out = "Fill them in, or leave rows or columns out."
        raise ValueError(f"{path}: of {len(frame)} rows, values are missing: {counts}{more}. {way_out}")
    text = [name for name in columns if frame[name].dtype.kind not in "iufb"]
    if text:
        some = ", ".join(f"{name!r} (e.g. {frame[name].iloc[0]!r})" for name in text[:5])
        way_out = f"Convert them, or name the columns to use: data.inputs=[{','.join(names[:2])},...]."
        raise TypeError(f"{path}: columns that hold no numbers: {some}. {way_out}")
    values = np.stack([frame[name].to_numpy(dtype=np.float64) for name in columns], axis=1)
    labels = frame[target].to_numpy()
    return {
        "train": Rows(
            as_inputs(values, str(path)), labels.astype(object) if labels.dtype.kind not in "iufb" else labels
        )
    }


def as_inputs(values: np.ndarray, what: str) -> Tensor:
    """Numbers as float32.

    Raises:
        TypeError: If they are none.
        ValueError: If one is not finite.
    """
    if values.dtype.kind not in "iufb":
        raise TypeError(f"{what} must hold numbers, got the type {values.dtype}. Convert it first.")
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ValueError(f"{what} holds {wrong} values that are NaN or infinite. Fill them in, or leave the rows out.")
    return torch.from_numpy(values.astype(np.float32))


def _kinds(inputs: str | None, target: str | None) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    return {"inputs": (inputs, _INPUTS), "target": (target, _TARGETS)}


def _by_split(arrays: dict[str, Any], key: str | None, names: tuple[str, ...], path: Path) -> dict[str, str]:
    """The key of each split."""
    for name in names if key is None else (key,):
        if name in arrays:
            return {"train": name}
        keys = {split: f"{name}_{split}" for of_one in SPLIT_NAMES.values() for split in of_one}
        if found := split_with_names({split: own for split, own in keys.items() if own in arrays}, str(path)):
            return found
    wanted = repr(key) if key else " or ".join(map(repr, names))
    setting = "inputs" if names is _INPUTS else "target"
    holds = ", ".join(map(repr, arrays)) or "nothing"
    raise ValueError(f"{path} holds no {wanted}, but {holds}. Name the key with data.{setting}=...")


def _frame(path: Path) -> Any:
    try:
        import pandas
    except ImportError as error:
        text = f"Reading {path.suffix} files needs pandas: pip install mm-lightning[data]."
        raise ImportError(f"{text} Or save arrays with np.savez, which needs nothing.") from error
    try:
        if path.suffix.lower() == ".parquet":
            return pandas.read_parquet(path)
        return pandas.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    except ImportError as error:
        raise ImportError("Reading .parquet files needs pyarrow: pip install mm-lightning[data].") from error
    except (OSError, ValueError) as error:  # of pandas and of pyarrow: their own are of these
        raise ValueError(f"{path} cannot be read as {path.suffix} ({error}).") from error
