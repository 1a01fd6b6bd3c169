"""Which tensors of what a module returns hold the rows of the batch, and in which dimension: learned by reordering."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RowSamples", "are_close", "mover", "order_of", "tolerance_of"]

_ROWS, _FEATURES = 16, 64  # of each tensor so many rows and elements are compared


@functools.lru_cache(maxsize=64)
def order_of(rows: int) -> Tensor:
    """An order of ``rows`` rows in which none stays where it is, int64 (rows,): always the same, and one cycle."""
    cycle = np.random.default_rng(rows).permutation(rows)
    order = np.empty(rows, dtype=np.int64)
    order[cycle] = np.roll(cycle, -1)
    return torch.from_numpy(order)


class RowSamples:
    """Some rows of tensors, in every dimension that may hold the batch.

    Args:
        tensors: What a call returned.
        sizes: Numbers of rows that the batch may have.
        is_reordered: Whether the batch was in the order of :func:`order_of`.
    """

    def __init__(self, tensors: Collection[Tensor], sizes: Collection[int], is_reordered: bool) -> None:
        self._samples = [
            {
                dim: _sample(tensor, dim, is_reordered)
                for dim, size in enumerate(tensor.shape)
                if size in sizes and (tensor.is_floating_point() or tensor.is_complex())
            }
            for tensor in tensors
        ]

    def dims(self, reordered: RowSamples) -> tuple[int | None, ...]:
        """The dimension of each tensor in which the rows of the reordered batch are those of this one, reordered."""
        return tuple(_dim_of(a, b) for a, b in zip(self._samples, reordered._samples, strict=False))


def tolerance_of(*dtypes: torch.dtype) -> float:
    """How far the same number may be from itself, relative, by the least precise type it is computed with."""
    if {torch.half, torch.bfloat16} & set(dtypes):
        return 2e-2
    return 1e-4 if {torch.float32, torch.complex64} & set(dtypes) else 1e-9


def mover(order: Tensor) -> Callable[[Tensor], Tensor]:
    """Permutes what has a row, or a block of rows, for each row of the batch."""
    rows = len(order)

    def move(tensor: Tensor) -> Tensor:
        places = order.to(tensor.device)
        if rows in tensor.shape:
            return tensor.index_select(tensor.shape.index(rows), places)
        if tensor.dim() and len(tensor) and len(tensor) % rows == 0:
            return tensor.unflatten(0, (rows, -1)).index_select(0, places).flatten(0, 1)
        return tensor

    return move


def are_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Whether two lists of losses are equal up to rounding."""
    return len(got) == len(wanted) and all(
        torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)
        for a, b in zip(got, wanted, strict=True)
    )


def _sample(tensor: Tensor, dim: int, is_reordered: bool) -> Tensor:
    """Rows i of a batch that was reordered, or rows ``order[i]`` of one that was not: if rows, the same."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    rest = (*tensor.shape[:dim], *tensor.shape[dim + 1 :], 1)
    rows, features = _places(tensor.shape[dim], is_reordered, rest, tensor.device)
    return tensor.detach().movedim(dim, 0).unsqueeze(-1)[(rows, *features)]


@functools.lru_cache(maxsize=256)
def _places(size: int, is_reordered: bool, rest: tuple[int, ...], device: torch.device) -> Any:
    """Indices (rows, 1) of some rows, and indices (features,) of some of their elements in each other dimension."""
    rows = torch.arange(0, size, max(1, size // _ROWS))[:_ROWS]
    rows = rows if is_reordered else order_of(size)[rows]
    count = math.prod(rest)
    features = np.unravel_index(np.arange(0, count, max(1, count // _FEATURES)), rest)
    return rows[:, None].to(device), tuple(torch.from_numpy(index).to(device) for index in features)


def _dim_of(plain: dict[int, Tensor], reordered: dict[int, Tensor]) -> int | None:
    found = [dim for dim in plain if dim in reordered and _is_close(plain[dim], reordered[dim])]
    if len(found) > 1:  # what is alike in all rows of one dimension tells nothing
        found.sort(key=lambda dim: bool((plain[dim] == plain[dim][:1]).all()))
    return found[0] if found else None


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    largest = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    tolerance = 10 * tolerance_of(a.dtype)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
