"""One batch's draw: where, with whom and how much it is mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_integer, check_number, plain, refusal
from mm_lightning.devices import sent
from mm_lightning.mixup.batch import check_batch_size
from mm_lightning.mixup.pairing import Pairing, RandomPermutation, check_pairing
from mm_lightning.mixup.ratio import BetaRatio, Ratio, alpha_of, check_ratio, is_by_row, is_off, with_alpha
from mm_lightning.mixup.schedule import Progress, Schedule, ScheduleSpec, check_schedule
from mm_lightning.mixup.seen import BATCH, LOGITS, PARTNER, TARGETS, call_with, seen_by

__all__ = [
    "Interpolation",
    "MixPlan",
    "PlanSource",
    "PlansAhead",
    "check_interpolation",
    "check_probability",
    "check_seed",
    "check_weights",
]

Interpolation = Callable[..., Any]
"""Takes hidden states (N, ...) and the plan; returns mixed ones, and the weight of the row itself in each, (N,)."""

# The layer is drawn alike on every rank, ratio and partners are not: independent streams of one seed.
_SHARED_STREAM, _RANK_STREAM, _NOISE_STREAM = 0, 1, 2


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
        drawn = _drawn(*self.draw(known), plan.batch_size, self.ratio, self.pairing)
        settled = replace(plan, pending=None, **drawn)
        return settled if plan.partner.device.type == "cpu" else settled.to(plan.partner.device)


@dataclass(frozen=True)
class PlanSource:
    """Draws the :class:`MixPlan` of any batch: a pure function of the seed and of the batch's place in training.

    No random state is kept, read or moved. The same (seed, epoch, batch index, rank) gives the same plan in any order
    of calls, so a resumed run continues the sequence. Ranks share the layer and draw their own partners and ratio.

    Args:
        layers: Names of the eligible layers, the set S of the paper. At least one.
        ratio: Draws ``lam``; called with a generator and the batch size, it returns (1,) or (N,).
        pairing: Draws ``partner``; called likewise, it returns (N,) row indices. Either may have parameters called
            ``targets``, ``batch``, ``logits`` or ``hidden``, a ratio ``partner``, too, and is handed these.
        weights: Probability of each layer up to a common factor, in the order of ``layers``. Uniform if None.
        probability: Share of the batches that is mixed, in [0, 1].
        seed: Integer in [0, 2**64).
        interpolation: Mixes rows with their partners; None is the linear interpolation. Called with hidden states
            (N, ...) and the plan, it returns mixed ones and the weight of the row itself, (N,).
        schedule: Factor of the probability as a function of :class:`Progress`, or a dict of such functions for
            ``"alpha"``, ``"probability"`` and names of layers.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of its range, ``weights`` does not fit ``layers``, or ``schedule`` names none of them.
    """

    layers: Sequence[str]
    ratio: Ratio = field(default_factory=BetaRatio)
    pairing: Pairing = field(default_factory=RandomPermutation)
    weights: Sequence[float] | None = None
    probability: float = 1.0
    seed: int = 0
    interpolation: Interpolation | None = None
    schedule: ScheduleSpec | None = None
    asks_for: frozenset[str] = field(init=False, repr=False, compare=False)
    _schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = plain(self.layers)
        if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
            raise refusal("layers", self.layers, "a sequence of layer names", "Give for example ['input'].")
        if not names:
            raise ValueError(f"layers must hold at least one layer name, got {self.layers!r}. Give ['input'], say.")
        check_ratio(self.ratio)
        check_pairing(self.pairing)
        check_weights(self.weights, len(self.layers))
        check_probability(self.probability)
        check_seed(self.seed)
        check_interpolation(self.interpolation)
        check_schedule(self.schedule, self.ratio)
        schedule = Schedule(self.schedule, names)
        asked = seen_by(self.pairing) | seen_by(self.ratio)
        asked |= frozenset() if self.interpolation is None else seen_by(self.interpolation)
        object.__setattr__(self, "asks_for", asked - {PARTNER})
        object.__setattr__(self, "_schedule", schedule)

    @property
    def is_by_row(self) -> bool:
        """Whether each row has a weight of its own."""
        return is_by_row(self.ratio) or bool(getattr(self.interpolation, "per_sample", False))

    def draw(
        self,
        batch_size: int,
        *,
        epoch: int = 0,
        batch_index: int = 0,
        rank: int = 0,
        progress: float | None = None,
        targets: Any = None,
        batch: Any = None,
        logits: Any = None,
    ) -> MixPlan:
        """Draw the plan of one batch, on the CPU.

        Args:
            batch_size: Number of rows, N >= 1. One row has no partner and stays unmixed.
            epoch: Epoch, from 0.
            batch_index: Index of the batch in its epoch, from 0.
            rank: Rank of the process among all that train together.
            progress: Share of training that lies behind, in [0, 1], for the schedule.
            targets: Targets of the batch, (N, ...), if pairing or ratio ask to see them.
            batch: The batch, if pairing, ratio or interpolation ask to see it.
            logits: The network's scores of the unmixed batch, (N, K), if pairing or ratio ask to see them. Hidden
                states are seen where the plan is used.

        Returns:
            The plan, the same for the same arguments. Its tensors are on the CPU.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If ``batch_size`` is below 1, another one negative, if ``pairing`` draws something else than
                rows of the batch, ``ratio`` something else than numbers in [0, 1], or the schedule no factor.
        """
        check_batch_size(batch_size)
        for name, value in (("epoch", epoch), ("batch_index", batch_index), ("rank", rank)):
            check_integer(name, value, "an integer in [0, 2**64)", lambda n: 0 <= n < 2**64, "Count from 0.")
        probability, weights, ratio = self.probability, self.weights, self.ratio
        if self.schedule is not None:
            if progress is None:
                raise ValueError("A schedule needs the share of training that lies behind: draw(..., progress=...).")
            expected, way_out = "a number in [0, 1]", "It is the share of training that lies behind."
            check_number("progress", progress, expected, lambda share: 0 <= share <= 1, way_out)
            now = Progress(progress, epoch, batch_index)
            probability, weights = self._schedule.probability(probability, now), self._schedule.weights(weights, now)
            if self._schedule.has_alpha:
                ratio = with_alpha(ratio, (alpha_of(ratio) or 0.0) * self._schedule.alpha(now))
        shared = self._rng(_SHARED_STREAM, epoch, batch_index, 0)
        layer = self._draw_layer(shared, weights)
        # Alike on every rank, whatever it draws: with what is settled later, too, nothing is seen in vain.
        if batch_size == 1 or layer is None or is_off(ratio) or shared.random() >= probability:
            return MixPlan.unmixed(batch_size)

        def draw(seen: Mapping[str, Any]) -> tuple[Any, Any]:
            """Ratio and partners; these first if the ratio asks for them."""
            own = self._rng(_RANK_STREAM, epoch, batch_index, rank)
            if PARTNER not in seen_by(ratio):
                return call_with(ratio, (own, batch_size), seen), call_with(self.pairing, (own, batch_size), seen)
            partner, _ = _checked_partner(call_with(self.pairing, (own, batch_size), seen), batch_size, self.pairing)
            return call_with(ratio, (own, batch_size), {**seen, PARTNER: partner}), partner

        seed = None
        if self.interpolation is not None:
            seed = torch.tensor(int(self._rng(_NOISE_STREAM, epoch, batch_index, rank).integers(2**63)))
        how: dict[str, Any] = {"interpolation": self.interpolation, "seed": seed}
        if self.asks_for:
            pending = Pending(draw, self.asks_for, self.ratio, self.pairing)
            plan = MixPlan(layer, torch.arange(batch_size), torch.ones(1).expand(batch_size), pending=pending, **how)
            given = {TARGETS: targets, BATCH: batch, LOGITS: logits}
            return plan.settled(**{name: value for name, value in given.items() if value is not None})
        return MixPlan(layer, **_drawn(*draw({}), batch_size, self.ratio, self.pairing), **how)

    def _draw_layer(self, rng: np.random.Generator, weights: Sequence[float] | None) -> str | None:
        """The layer; None if all have the weight 0, which a schedule may do."""
        if weights is None:
            return self.layers[int(rng.integers(len(self.layers)))]
        cumulative = np.cumsum(plain(weights))
        place = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        return None if cumulative[-1] == 0 else self.layers[place]

    def _rng(self, stream: int, epoch: int, batch_index: int, rank: int) -> np.random.Generator:
        # Philox is counter-based: the key names the sequence, the counter the place in it. Word 0 counts the draws.
        key = np.array([self.seed, stream], dtype=np.uint64)
        counter = np.array([0, batch_index, epoch, rank], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


class PlansAhead:
    """Draws a source's plans for some batches at once: the same plans, sooner.

    Drawing is a few dozen short calls. Between two training steps they find none of their code in the processor's
    caches, and one plan takes ten times as long as it does among others.

    Args:
        source: Draws each plan.
        count: Batches to draw for at once.
    """

    def __init__(self, source: PlanSource, count: int = 32) -> None:
        self.source = source
        self.count = count
        self._plans: dict[tuple[int, int, int, int], MixPlan] = {}
        self._batch_size = 0

    def draw(
        self, batch_size: int, *, epoch: int = 0, batch_index: int = 0, rank: int = 0, progress: float | None = None
    ) -> MixPlan:
        """Return a plan that :meth:`PlanSource.draw` has drawn from the same arguments, not returned before."""
        if self.source.schedule is not None:  # later batches have another progress
            place = {"epoch": epoch, "batch_index": batch_index, "rank": rank}
            return self.source.draw(batch_size, **place, progress=progress)
        if (batch_size, epoch, batch_index, rank) not in self._plans:
            # The next batches are taken to have the size of this one once two in a row had the same.
            count = self.count if batch_size == self._batch_size else 1
            self._plans = {
                (batch_size, epoch, i, rank): self.source.draw(batch_size, epoch=epoch, batch_index=i, rank=rank)
                for i in range(batch_index, batch_index + count)
            }
        self._batch_size = batch_size
        return self._plans.pop((batch_size, epoch, batch_index, rank))


def check_weights(weights: Any, num_layers: int | None = None, name: str = "weights") -> None:
    """Refuse weights of layers that are none.

    Args:
        weights: Any sequence of numbers, or None.
        num_layers: How many there must be, where that is known.
        name: What the user calls them.

    Raises:
        TypeError: If it is no sequence of numbers.
        ValueError: If one is negative or not finite, all are zero, or there are not as many as layers.
    """
    if weights is None:
        return
    expected = f"one number for each of the {num_layers or ''} eligible layers".replace("  ", " ")
    numbers, way_out = plain(weights), "None draws all layers alike."
    if not isinstance(numbers, list) or any(isinstance(w, bool) or not isinstance(w, Real) for w in numbers):
        raise refusal(name, weights, expected, way_out)
    if any(not 0 <= w < math.inf for w in numbers) or sum(numbers) <= 0:
        raise ValueError(f"{name} must be finite, >= 0 and not all zero, got {weights!r}. {way_out}")
    if num_layers not in (None, len(numbers)):
        raise ValueError(f"{name} must be {expected}, got {weights!r}. {way_out}")


def check_probability(probability: Any) -> None:
    """Raise TypeError unless ``probability`` is a number, and ValueError unless it is in [0, 1]."""
    check_number("probability", probability, "a number in [0, 1]", lambda p: 0 <= p <= 1, "0 switches mixing off.")


def check_seed(seed: Any) -> None:
    """Raise TypeError unless ``seed`` is an integer, and ValueError unless it is in [0, 2**64)."""
    check_integer("seed", seed, "an integer in [0, 2**64)", lambda seed: 0 <= seed < 2**64, "Give 0, for example.")


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


def _drawn(lam: Any, partner: Any, rows: int, ratio: Ratio, pairing: Pairing) -> dict[str, Any]:
    """What was drawn, as a plan has it.

    Raises:
        ValueError: If that is no ratio, or are no partners.
    """
    lam = np.array(lam, dtype=np.float32)
    if lam.shape not in ((1,), (rows,)) or not (lam.min() >= 0 and lam.max() <= 1):
        raise ValueError(f"{ratio!r} must draw numbers in [0, 1], one or one for each of the {rows} rows.")
    partner, inverse = _checked_partner(partner, rows, pairing)
    shared = float(lam[0]) if lam.shape == (1,) else None
    return {"partner": partner, "lam": torch.from_numpy(lam).expand(rows), "inverse": inverse, "shared_lam": shared}


def _checked_partner(partner: Any, rows: int, pairing: Pairing) -> tuple[Tensor, Tensor | None]:
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
