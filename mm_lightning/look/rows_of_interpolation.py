"""Is an interpolation one: each row of its row and its partner alone, with the weight that it says?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.look.look import Look
from mm_lightning.look.reordering import order_of
from mm_lightning.mixup import Layer
from mm_lightning.mixup.plan import Interpolation, MixPlan
from mm_lightning.mixup.seen import BATCH, seen_by

__all__ = ["unfit"]

_ENOUGH = 8


def unfit(look: Look, layer: Layer, interpolation: Interpolation | None, by_row: bool) -> str:
    """Say why an interpolation cannot mix a layer; empty if it can.

    Args:
        look: The look at the step.
        layer: The layer, which runs once.
        interpolation: The interpolation; None is the linear one, which can.
        by_row: Whether rows may have weights of their own.
    """
    if interpolation is None:
        return ""
    shapes = look.mixed_shapes(layer)
    if len(shapes) != 1:
        return f"{interpolation!r} mixes one tensor, and there are {len(shapes)}"
    batch = look.args[0] if BATCH in seen_by(interpolation) else None
    problem = _problem_of(interpolation, shapes[0], look.module.device, batch, by_row)
    return f"{interpolation!r} does not fit: {problem}" if problem else ""


def _problem_of(
    interpolation: Interpolation, shape: tuple[int, ...], device: torch.device, batch: Any, by_row: bool
) -> str:
    """Say why hidden states of a shape cannot be mixed so; empty if they can.

    Args:
        interpolation: Not the linear one.
        shape: Of the hidden states, (N, ...), with N >= 2.
        device: Of the hidden states.
        batch: Handed to it if it asks.
        by_row: Whether rows may have weights of their own.
    """
    knows = getattr(interpolation, "problem_with", None)
    if knows is not None and (problem := knows(shape)):
        return f"{problem}, and this is of shape {shape}"
    if batch is None:  # a few rows tell, at less memory than a step takes
        shape = (min(shape[0], _ENOUGH), *shape[1:])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(device)
    order = order_of(shape[0]).to(device)
    made = _mixed(interpolation, hidden, order, 0.5, batch)
    if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(part, Tensor) for part in made):
        return f"it must return two tensors, mixed rows and the weight of the row itself, got {type(made).__name__}"
    mixed, weights = made
    if mixed.shape != hidden.shape or mixed.dtype != hidden.dtype:
        got = f"{mixed.dtype} of shape {tuple(mixed.shape)}"
        return f"it must return rows as it gets them, {hidden.dtype} of shape {shape}, got {got}"
    if not torch.equal(mixed, _mixed(interpolation, hidden, order, 0.5, batch)[0]):
        return "it draws anew whenever it is called; draw with mm_lightning.mixup.uniform(plan.seed, ...)"
    if weights.shape != shape[:1] or not bool(((weights >= 0) & (weights <= 1)).all()):
        return f"it must return the weight of the row itself, in [0, 1], ({shape[0]},), got {tuple(weights.shape)}"
    if bool((weights != weights[0]).any()) and not by_row:
        return "it gives each row a weight of its own, which it must say by an attribute per_sample = True"
    for row in range(min(3, shape[0])):  # one row's partner may be the very row that is taken for all
        others = torch.randn(shape, generator=generator).to(device)
        pair = torch.stack((torch.tensor(row, device=device), order[row]))
        others[pair] = hidden[pair]
        again, _ = _mixed(interpolation, others, order, 0.5, batch)
        if not torch.equal(again[row], mixed[row]):
            return "it makes a row of other rows than the row itself and its partner, which targets would not be"
    for lam in (1.0, 0.5, 0.0):
        mixed, weights = _mixed(interpolation, hidden, order, lam, batch)
        for rows, weight, whose in ((hidden, 1.0, "own"), (hidden[order], 0.0, "partners'")):
            if torch.equal(mixed, rows) and not bool((weights == weight).all()):
                return f"it returns the {whose} rows, but {float(weights[0]):.6g} as weight of the row itself"
    return ""


def _mixed(interpolation: Interpolation, hidden: Tensor, order: Tensor, lam: float, batch: Any) -> Any:
    shared = torch.full((1,), lam, device=hidden.device).expand(len(hidden))
    plan = MixPlan("layer", order, shared, order.argsort(), lam, interpolation, torch.tensor(0), batch)
    return interpolation(hidden, plan, *(() if batch is None else (batch,)))
