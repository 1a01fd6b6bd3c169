"""Training, validation and test rows of one's own data: as they are given, or drawn from a seed, class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_number

__all__ = ["SPLIT_NAMES", "check_shares", "complete_splits", "split_rows", "split_with_names"]

# What folders, keys and the splits of a DatasetDict are called. The first of each is what the others are called here.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}

_SPLIT_STREAM = 4  # of the seed; mixing draws from 0 and 1, the spirals from 2 and 3


def check_shares(val_share: Any, test_share: Any) -> None:
    """Refuse shares that are no numbers in (0, 1)."""
    for name, share in (("val_share", val_share), ("test_share", test_share)):
        check_number(name, share, "a number in (0, 1)", lambda share: 0 < share < 1, "0.1 takes a tenth of the rows.")


def split_with_names(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What stands under the names of splits, e.g. ``validation``, as ``train``, ``val`` and ``test``.

    Raises:
        ValueError: If there are two of one, or there is one but none to train on.
    """
    found = {split: [name for name in names if name in given] for split, names in SPLIT_NAMES.items()}
    for split, names in found.items():
        if len(names) > 1:
            raise ValueError(f"{what} holds {' and '.join(map(repr, names))}, both of which mean {split}. Keep one.")
    if any(found.values()) and not found["train"]:
        names = [name for of_one in found.values() for name in of_one]
        raise ValueError(f"{what} holds {', '.join(map(repr, names))} but nothing to train on. Add 'train'.")
    return {split: given[names[0]] for split, names in found.items() if names}


def complete_splits(
    targets: Mapping[str, Tensor], val_share: float, test_share: float, seed: int
) -> dict[str, tuple[str, Tensor]]:
    """Take the splits that are not given from the training rows.

    Args:
        targets: Class indices (N,) of each split that is given, ``"train"`` among them.
        val_share: Share of the training rows that a missing ``"val"`` gets.
        test_share: The same of ``"test"``.
        seed: Of the draw, in [0, 2**32).

    Returns:
        For each of the three splits the given one that its rows are from, and their numbers there, ascending.

    Raises:
        ValueError: If the shares that are taken leave nothing to train on.
    """
    shares = {"test": test_share, "val": val_share}
    taken = {name: shares[name] for name in shares if name not in targets}
    if sum(taken.values()) >= 1:  # a share of what is given is not asked for
        total = f"val_share and test_share must leave rows to train on, got {val_share} and {test_share}"
        raise ValueError(f"{total}. 0.1 for each leaves four fifths.")
    drawn = split_rows(targets["train"], taken, seed)
    own = {name: (name, torch.arange(len(targets[name]))) for name in targets if name != "train"}
    return {**{name: ("train", rows) for name, rows in drawn.items()}, **own}


def split_rows(targets: Tensor, shares: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Draw rows for each share, stratified: each class gives as many as its size, rounded up or down.

    A class is never taken from the training rows altogether. The draw is a function of the arguments alone.

    Args:
        targets: Class indices int64 (N,).
        shares: Share of the rows of each split but ``"train"``, which gets the rest.
        seed: In [0, 2**32).

    Returns:
        Row numbers of each split and of ``"train"``, ascending.

    Raises:
        ValueError: If a split would be left without rows.
    """
    order = np.random.Generator(np.random.Philox(key=np.array([seed, _SPLIT_STREAM], dtype=np.uint64)))
    rows = order.permutation(len(targets))
    rows = rows[np.argsort(targets.numpy()[rows], kind="stable")]  # class by class, in random order within one
    counts = np.bincount(targets.numpy())
    begins, left = np.cumsum(counts) - counts, np.maximum(counts - 1, 0)  # one row of each class stays to train on
    split_of_row = np.full(len(rows), -1)
    for number, (name, share) in enumerate(shares.items()):
        # the rounded sums of classes, not the sum of rounded classes: many small ones would get nothing
        ends = np.floor(np.cumsum(counts) * share + 0.5).astype(int)
        taken = np.minimum(np.diff(ends, prepend=0), left)
        if not taken.sum():
            text = f"{name} gets none of {len(rows)} rows of {len(counts)} classes with a share of {share}"
            raise ValueError(f"{text}. Give more rows, or a larger data.{name}_share.")
        for begin, count in zip(begins, taken, strict=True):
            split_of_row[begin : begin + count] = number
        begins, left = begins + taken, left - taken
    found = {name: np.sort(rows[split_of_row == number]) for number, name in enumerate(shares)}
    return {"train": torch.from_numpy(np.sort(rows[split_of_row == -1]))} | {
        name: torch.from_numpy(own) for name, own in found.items()
    }
