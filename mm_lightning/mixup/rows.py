"""Whether a function compares the targets of different rows with each other, as contrastive losses do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm_lightning.mixup.pair import Pair

__all__ = ["compare_rows", "functions_of"]

# Functions of two operands, row by row, or of all rows with all rows.
_COMPARISONS = frozenset(
    """
    eq ne lt gt le ge sub add mul div where minimum maximum logical_and logical_or logical_xor matmul mm outer cdist
    __eq__ __ne__ __lt__ __gt__ __le__ __ge__ __sub__ __rsub__ __add__ __radd__ __mul__ __rmul__ __truediv__ __matmul__
    __rmatmul__ __and__ __or__ __xor__ isin
    """.split()
)
_PLACING = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze permute transpose movedim expand ravel t chunk split unbind narrow
    select __getitem__ __get__ detach view_as swapaxes roll flip index_select take contiguous clone repeat stack cat
    """.split()
)
_PICKING = frozenset({"__getitem__", "select", "unbind", "roll", "flip", "index_select", "take", "narrow"})
_SUMMING = frozenset(
    """
    sum mean median amax amin max min std var norm prod bincount unique logsumexp quantile count_nonzero any all
    """.split()
)


def compare_rows(name: str, pairs: Sequence[Pair]) -> bool:
    """Whether a function gets the batch in different places, seen from the last dimension, or one row and all.

    Args:
        name: Of the function. Those of one operand, and those that join or look up, compare nothing.
        pairs: Its operands that are pairs.
    """
    if name not in _COMPARISONS:
        return False
    pure = [pair for pair in pairs if pair.is_pure and not pair.is_mixed and not pair.lost]
    if len(pure) < 2:
        return False
    found = {pair: places for pair in pure if (places := _places_of_rows(pair)) is not None}
    holding = [places for places in found.values() if places]
    if len(holding) > 1 and not set.intersection(*holding):
        return True
    picked = [pair for pair, places in found.items() if not places and not _is_statistic(pair)]
    if holding:
        return any(_picks_rows(pair) for pair in picked)
    return len(picked) > 1 and _are_of_other_rows(picked)


def _places_of_rows(pair: Pair) -> set[int] | None:
    """Dimensions, counted from the last, along which the pair holds the batch; None if it is the same for partners."""
    own, partner = pair.value, pair.partner
    if own.shape == partner.shape and torch.allclose(own.double(), partner.double(), equal_nan=True):
        return None  # a statistic of the whole batch
    return {
        dim - own.dim()
        for dim in range(own.dim())
        for rows in _layouts(pair.plan.partner, own.shape[dim])
        if torch.equal(own.index_select(dim, rows), partner)
    }


def _layouts(partner: Tensor, size: int) -> list[Tensor]:
    """Partners along a dimension that holds every row several times: the rows in turn, or each several times."""
    times, rest = divmod(size, len(partner))
    if rest or not times:
        return []
    copies = torch.arange(times, device=partner.device)
    in_turn = partner + len(partner) * copies[:, None]  # (times, N)
    each = partner[:, None] * times + copies  # (N, times)
    return [in_turn.flatten(), each.flatten()] if times > 1 else [partner]


def _rows_of(pair: Pair) -> Tensor:
    """Which row of the batch each element came from, where only the places of elements were changed."""
    if pair._expression is None:
        rows = torch.arange(pair.value.shape[0], device=pair.value.device, dtype=torch.float64)
        return rows.view(-1, *[1] * (pair.value.dim() - 1)).expand(pair.value.shape)
    expression = pair._expression
    if expression.name in _PLACING:
        found = expression.evaluate(lambda tensor: _rows_of(tensor) if isinstance(tensor, Pair) else tensor)
        return found[pair._index]
    # Element by element, or unknown.
    rows = torch.broadcast_tensors(*[_rows_of(tensor) for tensor in expression.tensors if isinstance(tensor, Pair)])
    if rows[0].shape != pair.value.shape or any(not torch.equal(other, rows[0]) for other in rows):
        raise ValueError
    return rows[0]


def _is_statistic(pair: Pair) -> bool:
    """Whether rows were summed up."""
    return bool(functions_of(pair) & _SUMMING)


def _picks_rows(pair: Pair) -> bool:
    """Whether some rows were picked."""
    return bool(functions_of(pair) & _PICKING)


def _are_of_other_rows(pairs: Sequence[Pair]) -> bool:
    """Whether the same places of the pairs hold different rows, as far as one can tell."""
    try:
        first, *others = torch.broadcast_tensors(*[_rows_of(pair) for pair in pairs])
    except (RuntimeError, TypeError, ValueError):
        return False
    return any(not torch.equal(first, other) for other in others)


def functions_of(pair: Pair) -> set[str]:
    """Names of the functions that the pair was computed by."""
    names: set[str] = set()
    waiting: list[Any] = [pair]
    while waiting:
        expression = waiting.pop()._expression
        if expression is not None:
            names.add(expression.name)
            waiting.extend(tensor for tensor in expression.tensors if isinstance(tensor, Pair))
    return names
