"""One batch's draw: where, with whom and how much it is mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import refusal
from mm_lightning.devices import sent
from mm_lightning.mixup.pairing import Pairing
from mm_lightning.mixup.ratio import Ratio
from mm_lightning.mixup.seen import BATCH, seen_by

__all__ = ["Interpolation", "MixPlan", "Pending", "check_interpolation", "checked_partner", "drawn"]

Interpolation = Callable[..., Any]
"""Takes hidden states (N, ...) and the plan; returns mixed ones, and the weight of the row itself in each, (N,)."""


@dataclass(frozen=True, eq=False)
class MixPlan:
    """How one batch is mixed. Drawn once a batch; hidden state, targets, loss and log only read it.

    Attributes:
        layer: Name of the layer after which the batch is mixed, ``"input"`` for the batch itself (k = 0 in the paper),
            or None for a batch that stays unmixed.
        partner: The row mixed into each row, int64 (N,).
        lam: Weight of the row itself, float32 in [0, 1], (N,). The same number in every row unless drawn per sample.
        inverse: For a permutation ``partner`` its inverse, int64 (N,): the row that row i is mixed into. It turns the
            backward pass into a gather. None is always right, only slower.
        shared_lam: The number in every row of ``lam``, if there is one, for code that would wait for a device to read
            it. None is always right here, too; a plan with another ``lam`` must not keep the number.
        interpolation: How rows are mixed; None is the linear interpolation.
        seed: Seed of what the interpolation draws, int64 scalar on the CPU; None for the linear one.
        batch: The batch, for an interpolation that asks to see it.
        pending: What is left to draw once more is seen: partners by hidden states, say. Until then ``partner`` and
            ``lam`` hold no draws.
    """

    layer: str | None
    partner: Tensor
    lam: Tensor
    inverse: Tensor | None = None
    shared_lam: float | None = None
    interpolation: Interpolation | None = None
    seed: Tensor | None = None
    batch: Any = None
    pending: Pending | None = None

    @property
    def mixes(self) -> bool:
        """Whether the batch is mixed at all."""
        return self.layer is not None

    @property
    def asks_for(self) -> frozenset[str]:
        """What must be seen before the plan is settled: ``"targets"``, ``"batch"``, ``"logits"``, ``"hidden"``."""
        return frozenset() if self.pending is None else self.pending.asks_for

    @property
    def ratio(self) -> Any:
        """The weight of the own loss: the mean of ``lam``, a number where that is known without asking a device."""
        if self.shared_lam is not None:
            return self.shared_lam
        return self.lam[0] if self.lam.stride(0) == 0 else self.lam.mean()

    @property
    def batch_size(self) -> int:
        """Number of rows, N."""
        return self.partner.shape[0]

    def to(self, device: torch.device | str) -> MixPlan:
        """Return the plan with its tensors on ``device``."""
        device = torch.device(device)
        orders = [self.partner] if self.inverse is None else [self.partner, self.inverse]
        if all(tensor.device == device for tensor in (*orders, self.lam)):
            return self
        # A copy to a GPU takes as long as several operations of a small network: one of what was drawn, else none.
        if self.mixes:
            is_together = orders[0].device == orders[-1].device
            moved = sent(torch.stack(orders), device).unbind() if is_together else [sent(o, device) for o in orders]
        else:
            moved = [torch.arange(self.batch_size, device=device)] * len(orders)
        one, known = self.lam[:1] if self.lam.stride(0) == 0 else self.lam, self.shared_lam
        lam = sent(one, device) if known is None else torch.full((1,), known, dtype=one.dtype, device=device)
        inverse = None if self.inverse is None else moved[-1]
        return replace(self, partner=moved[0], lam=lam.expand(self.lam.shape), inverse=inverse)

    def settled(self, **seen: Any) -> MixPlan:
        """Return the plan with what it asks for, as far as it is given: once all is, partners and ``lam`` are drawn.

        Args:
            seen: By the names of :attr:`asks_for`. What it does not ask for is left aside.

        Raises:
            ValueError: If the pairing or the ratio draws something else than it should.
        """
        return self if self.pending is None else self.pending.settle(self, seen)

    def for_loss(self, lam: Tensor) -> MixPlan:
        """Return the plan with the weight that the interpolation gave the row itself, (N,), and without it."""
        is_own = lam is self.lam
        return replace(self, lam=lam, shared_lam=self.shared_lam if is_own else None, interpolation=None)

    def check_for_loss(self) -> None:
        """Raise ValueError unless targets can be mixed by it: of some plans :func:`interpolate` tells how."""
        if self.interpolation is not None or self.pending is not None:
            raise ValueError(
                "The plan does not tell yet how targets are mixed: it has an interpolation of its own, or draws "
                "partners once more is seen. Use the plan that interpolate(hidden, plan) returns."
            )

    @classmethod
    def unmixed(cls, batch_size: int) -> MixPlan:
        """Return the plan that leaves a batch of ``batch_size`` rows as it is."""
        rows = torch.arange(batch_size)
        return cls(None, rows, torch.ones(1).expand(batch_size), rows, 1.0)


@dataclass(frozen=True, eq=False)
class Pending:
    """What a plan still has to draw.

    Attributes:
        draw: Draws ratio and partners, once all is seen.
        asks_for: Names of what must be seen.
        ratio: Of the source.
        pairing: Of the source.
        seen: What was seen.
    """

    draw: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    asks_for: frozenset[str]
    ratio: Ratio
    pairing: Pairing
    seen: Mapping[str, Any] = field(default_factory=dict)

    def settle(self, plan: MixPlan, seen: Mapping[str, Any]) -> MixPlan:
        """A plan with what was seen now."""
        known = {**self.seen, **{name: seen[name] for name in self.asks_for if name in seen}}
        if plan.interpolation is not None and BATCH in seen_by(plan.interpolation):
            plan = replace(plan, batch=known.get(BATCH))
        if missing := self.asks_for - known.keys():
            return replace(plan, pending=replace(self, asks_for=missing, seen=known))
        found = drawn(*self.draw(known), plan.batch_size, self.ratio, self.pairing)
        settled = replace(plan, pending=None, **found)
        return settled if plan.partner.device.type == "cpu" else settled.to(plan.partner.device)


def check_interpolation(interpolation: Any) -> None:
    """Raise TypeError unless ``interpolation`` is None or can be called; a class such as ``CutMix`` cannot.

    Raises:
        TypeError: Also if it asks to see what it is not handed.
    """
    if interpolation is not None and (isinstance(interpolation, type) or not callable(interpolation)):
        expected = "a function of hidden states and the plan"
        raise refusal("interpolation", interpolation, expected, "Give CutMix(), say; None is the linear one.")
    if interpolation is not None and (others := seen_by(interpolation) - {BATCH}):
        raise TypeError(
            f"interpolation may ask for the batch alone, but {interpolation!r} asks for "
            f"{' and '.join(sorted(others))}. Take it from the batch, by a third parameter called batch."
        )


def drawn(lam: Any, partner: Any, rows: int, ratio: Ratio, pairing: Pairing) -> dict[str, Any]:
    """What was drawn, as a plan has it.

    Raises:
        ValueError: If that is no ratio, or are no partners.
    """
    lam = np.array(lam, dtype=np.float32)
    if lam.shape not in ((1,), (rows,)) or not (lam.min() >= 0 and lam.max() <= 1):
        raise ValueError(f"{ratio!r} must draw numbers in [0, 1], one or one for each of the {rows} rows.")
    partner, inverse = checked_partner(partner, rows, pairing)
    shared = float(lam[0]) if lam.shape == (1,) else None
    return {"partner": partner, "lam": torch.from_numpy(lam).expand(rows), "inverse": inverse, "shared_lam": shared}


def checked_partner(partner: Any, rows: int, pairing: Pairing) -> tuple[Tensor, Tensor | None]:
    """Partners as int64 (N,), and of a permutation the inverse; not on a device that would be waited for."""
    is_far = isinstance(partner, Tensor) and partner.device.type != "cpu"
    numbers: Any = partner if is_far else np.array(partner.detach().numpy() if isinstance(partner, Tensor) else partner)
    is_whole = not numbers.is_floating_point() if is_far else numbers.dtype.kind in "iu"
    if not is_whole or numbers.shape != (rows,) or not (is_far or (numbers.min() >= 0 and numbers.max() < rows)):
        raise ValueError(f"{pairing!r} must draw one row in 0 ... {rows - 1} for each of the rows.")
    if is_far:
        return numbers.detach().long(), None
    numbers = numbers.astype(np.int64, copy=False)
    own = np.arange(rows)
    inverse = np.zeros_like(numbers)
    inverse[numbers] = own
    is_permutation = np.array_equal(numbers[inverse], own)
    return torch.from_numpy(numbers), torch.from_numpy(inverse) if is_permutation else None
