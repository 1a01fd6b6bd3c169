"""Draws plans: a pure function of the seed and of a batch's place in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch

from mm_lightning.arguments import check_integer, check_number, plain, refusal
from mm_lightning.mixup.batch import check_batch_size
from mm_lightning.mixup.pairing import Pairing, RandomPermutation, check_pairing
from mm_lightning.mixup.plan import Interpolation, MixPlan, Pending, check_interpolation, checked_partner, drawn
from mm_lightning.mixup.ratio import BetaRatio, Ratio, alpha_of, check_ratio, is_by_row, is_off, with_alpha
from mm_lightning.mixup.schedule import Progress, Schedule, ScheduleSpec, check_schedule
from mm_lightning.mixup.seen import BATCH, LOGITS, PARTNER, TARGETS, call_with, seen_by

__all__ = ["PlanSource", "PlansAhead", "check_probability", "check_seed", "check_weights"]

# The layer is drawn alike on every rank, ratio and partners are not: independent streams of one seed.
_SHARED_STREAM, _RANK_STREAM, _NOISE_STREAM = 0, 1, 2


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
            partner, _ = checked_partner(call_with(self.pairing, (own, batch_size), seen), batch_size, self.pairing)
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
        return MixPlan(layer, **drawn(*draw({}), batch_size, self.ratio, self.pairing), **how)

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
