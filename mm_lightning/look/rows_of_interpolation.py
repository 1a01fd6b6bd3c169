"""Is an interpolation one: each row of its row and its partner alone, with the weight that it says?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.look.reordering import order_of
from mm_lightning.mixup.plan import Interpolation, MixPlan

__all__ = ["problem_of"]

_ENOUGH = 8


def problem_of(interpolation: Interpolation, shape: tuple[int, ...], batch: Any, by_row: bool) -> str:
    """Say why hidden states of a shape cannot be mixed so; empty if they can.

    Args:
        interpolation: Not the linear one.
        shape: Of the hidden states, (N, ...), with N >= 2.
        batch: Handed to it if it asks.
        by_row: Whether rows may have weights of their own.
    """
    knows = getattr(interpolation, "problem_with", None)
    if knows is not None and (problem := knows(shape)):
        return f"{problem}, and this is of shape {shape}"
    if batch is None:  # a few rows tell, at less memory than a step takes
        shape = (min(shape[0], _ENOUGH), *shape[1:])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator)
    order = order_of(shape[0])
    mixed, weights = _mixed(interpolation, hidden, order, 0.5, batch)
    if weights.shape != shape[:1] or not bool(((weights >= 0) & (weights <= 1)).all()):
        return f"it must return the weight of the row itself, in [0, 1], ({shape[0]},), got {tuple(weights.shape)}"
    if bool((weights != weights[0]).any()) and not by_row:
        return "it gives each row a weight of its own, which it must say by an attribute per_sample = True"
    for row in range(min(3, shape[0])):  # one row's partner may be the very row that is taken for all
        others = torch.randn(shape, generator=generator)
        pair = torch.stack((torch.tensor(row), order[row]))
        others[pair] = hidden[pair]
        again, _ = _mixed(interpolation, others, order, 0.5, batch)
        if mixed.shape == hidden.shape and not torch.equal(again[row], mixed[row]):
            return "it makes a row of other rows than the row itself and its partner, which targets would not be"
    for lam, expected, whose in ((1.0, hidden, "own"), (0.0, hidden[order], "partner's")):
        mixed, weights = _mixed(interpolation, hidden, order, lam, batch)
        if torch.equal(mixed, expected) and not bool((weights == lam).all()):
            return f"it returns the {whose} rows, but {float(weights[0]):.6g} as weight of the row itself"
    return ""


def _mixed(
    interpolation: Interpolation, hidden: Tensor, order: Tensor, lam: float, batch: Any
) -> tuple[Tensor, Tensor]:
    shared = torch.full((1,), lam).expand(len(hidden))
    plan = MixPlan("layer", order, shared, order.argsort(), lam, interpolation, torch.tensor(0), batch)
    mixed, weights = interpolation(hidden, plan, *(() if batch is None else (batch,)))
    return mixed, weights
