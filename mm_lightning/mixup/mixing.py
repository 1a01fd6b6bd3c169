"""One batch while it is mixed: its plan meets the hidden states."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from mm_lightning.mixup.interpolation import mix_rows
from mm_lightning.mixup.plan import MixPlan

__all__ = ["Mixing", "interpolate"]


class Mixing:
    """Mixes the hidden states of one batch, at first and whenever they are computed again.

    A compiled graph reads and writes plain attributes of it.

    Attributes:
        plan: The plan; settled as soon as hidden states that it asks for were seen.
        lam: The weight that the interpolation gave the row itself, (N,); None if that is the plan's.
        shape: Of the hidden states that an interpolation of its own has mixed.
    """

    def __init__(self, plan: MixPlan) -> None:
        self.plan = plan
        self.lam: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        if plan.pending is not None and "torch._dynamo" in sys.modules:  # which cannot trace how partners are drawn
            self._settle = torch.compiler.disable(self._settle)  # type: ignore[method-assign]

    @property
    def for_loss(self) -> MixPlan:
        """The plan as targets are mixed by it.

        Raises:
            RuntimeError: If nothing was mixed yet that the plan depends on, or rows have weights of their own and the
                interpolation has not said so.
        """
        if self.plan.pending is not None:
            raise RuntimeError(
                f"A loss is computed before layer {self.plan.layer!r} has run, which tells the partners. Choose "
                "another layer, or a pairing that does not look at hidden states."
            )
        if self.lam is None:
            return self.plan if self.plan.interpolation is None else self.plan.for_loss(self.plan.lam)
        is_by_row = self.plan.lam.stride(0) != 0 or getattr(self.plan.interpolation, "per_sample", False)
        if self.lam.stride(0) != 0 and not is_by_row:
            self.lam = _one_number(self.lam, self.plan)
        return self.plan.for_loss(self.lam)

    def mix(self, rows: Tensor) -> Tensor:
        """Mix hidden states (N, ...)."""
        plan = self.plan
        if plan.pending is not None:
            plan = self._settle(rows)
            if plan.pending is not None:
                name = sorted(plan.asks_for)[0]
                raise ValueError(f"The plan asks for {name}, which must be given: draw(..., {name}=...).")
        if plan.interpolation is None:
            return mix_rows(rows, plan)
        asked = () if plan.batch is None else (plan.batch,)
        mixed, lam = plan.interpolation(rows, plan, *asked)
        if lam is not plan.lam:
            self.lam = lam
        self.shape = tuple(rows.shape)
        return mixed

    def _settle(self, rows: Tensor) -> MixPlan:
        self.plan = self.plan.settled(hidden=rows)
        return self.plan


def _one_number(lam: Tensor, plan: MixPlan) -> Tensor:
    """Weights that are alike in all rows as one number; of another device it is waited for them."""
    if bool((lam != lam[:1]).any()):
        raise RuntimeError(
            f"{plan.interpolation!r} gives each row a weight of its own, which it must say: give it an attribute "
            "per_sample = True."
        )
    return lam[:1].expand(len(lam))


def interpolate(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, MixPlan]:
    """Mix a batch of hidden states as planned, whatever the interpolation is.

    Args:
        hidden: Hidden states or inputs, floating point or complex, (N, ...). Not changed.
        plan: The batch's plan, its tensors on the device of ``hidden``.

    Returns:
        Mixed hidden states, and the plan for the loss: with the partners that were drawn by the hidden states, where
        the pairing asks for them, and with the weight that the interpolation gave the row itself.

    Raises:
        TypeError: If ``hidden`` holds integers.
        ValueError: If ``hidden`` has another number of rows than the plan, or a shape that cannot be mixed so.

    Example:
        >>> plan = PlanSource(["input"], interpolation=CutMix()).draw(len(images))  # doctest: +SKIP
        >>> mixed, plan = interpolate(images, plan)  # doctest: +SKIP
        >>> mixed_cross_entropy(network(mixed), targets, plan)  # doctest: +SKIP
    """
    if not plan.mixes:
        return hidden, plan
    mixing: Any = Mixing(plan)
    return mixing.mix(hidden), mixing.for_loss
