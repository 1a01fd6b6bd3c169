"""One batch's draw: where, with whom and how much it is mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_integer, check_number, plain, refusal
from mm_lightning.mixup.batch import check_batch_size
from mm_lightning.mixup.pairing import Pairing, RandomPermutation, check_pairing
from mm_lightning.mixup.ratio import BetaRatio

__all__ = ["MixPlan", "PlanSource", "PlansAhead", "check_probability", "check_seed", "check_weights"]

Ratio = Callable[[np.random.Generator, int], np.ndarray]

# The layer is drawn alike on every rank, ratio and partners are not: two independent streams of one seed.
_SHARED_STREAM, _RANK_STREAM = 0, 1


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
    """

    layer: str | None
    partner: Tensor
    lam: Tensor
    inverse: Tensor | None = None
    shared_lam: float | None = None

    @property
    def mixes(self) -> bool:
        """Whether the batch is mixed at all."""
        return self.layer is not None

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
        if device == self.partner.device:
            return self
        inverse = None if self.inverse is None else _move(self.inverse, device)
        return MixPlan(self.layer, _move(self.partner, device), _move(self.lam, device), inverse, self.shared_lam)

    @classmethod
    def unmixed(cls, batch_size: int) -> MixPlan:
        """Return the plan that leaves a batch of ``batch_size`` rows as it is."""
        rows = torch.arange(batch_size)
        return cls(None, rows, torch.ones(1).expand(batch_size), rows, 1.0)


@dataclass(frozen=True)
class PlanSource:
    """Draws the :class:`MixPlan` of any batch: a pure function of the seed and of the batch's place in training.

    No random state is kept, read or moved. The same (seed, epoch, batch index, rank) gives the same plan in any order
    of calls, so a resumed run continues the sequence. Ranks share the layer and draw their own partners and ratio.

    Args:
        layers: Names of the eligible layers, the set S of the paper. At least one.
        ratio: Draws ``lam``.
        pairing: Draws ``partner``; called with a generator and the batch size, it returns (N,) row indices.
        weights: Probability of each layer up to a common factor, in the order of ``layers``. Uniform if None.
        probability: Share of the batches that is mixed, in [0, 1].
        seed: Integer in [0, 2**64).

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of its range or ``weights`` does not fit ``layers``.
    """

    layers: Sequence[str]
    ratio: Ratio = field(default_factory=BetaRatio)
    pairing: Pairing = field(default_factory=RandomPermutation)
    weights: Sequence[float] | None = None
    probability: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        names = plain(self.layers)
        if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
            raise refusal("layers", self.layers, "a sequence of layer names", "Give for example ['input'].")
        if not names:
            raise ValueError(f"layers must hold at least one layer name, got {self.layers!r}. Give ['input'], say.")
        if isinstance(self.ratio, type) or not callable(self.ratio):
            expected = "a function of a numpy.random.Generator and the number of rows"
            raise refusal("ratio", self.ratio, expected, "Give BetaRatio(alpha).")
        check_pairing(self.pairing)
        check_weights(self.weights, len(self.layers))
        check_probability(self.probability)
        check_seed(self.seed)

    def draw(self, batch_size: int, *, epoch: int = 0, batch_index: int = 0, rank: int = 0) -> MixPlan:
        """Draw the plan of one batch, on the CPU.

        Args:
            batch_size: Number of rows, N >= 1. One row has no partner and stays unmixed.
            epoch: Epoch, from 0.
            batch_index: Index of the batch in its epoch, from 0.
            rank: Rank of the process among all that train together.

        Returns:
            The plan, the same for the same arguments.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If ``batch_size`` is below 1, another one negative, or if ``pairing`` draws something else than
                rows of the batch.
        """
        check_batch_size(batch_size)
        for name, value in (("epoch", epoch), ("batch_index", batch_index), ("rank", rank)):
            check_integer(name, value, "an integer in [0, 2**64)", lambda n: 0 <= n < 2**64, "Count from 0.")
        shared = self._rng(_SHARED_STREAM, epoch, batch_index, 0)
        layer = self.layers[self._draw_layer(shared)]
        if batch_size == 1 or shared.random() >= self.probability:
            return MixPlan.unmixed(batch_size)
        own = self._rng(_RANK_STREAM, epoch, batch_index, rank)
        lam = np.array(self.ratio(own, batch_size), dtype=np.float32)
        if (lam == 1).all():  # nothing of the partners is wanted: leave the batch exactly as it is
            return MixPlan.unmixed(batch_size)
        partner = np.array(self.pairing(own, batch_size), dtype=np.int64)
        if partner.shape != (batch_size,) or partner.min() < 0 or partner.max() >= batch_size:
            raise ValueError(f"{self.pairing!r} must draw one row in 0 ... {batch_size - 1} for each of the rows.")
        inverse = _inverse(partner)
        return MixPlan(
            layer=layer,
            partner=torch.from_numpy(partner),
            lam=torch.from_numpy(lam).expand(batch_size),
            inverse=None if inverse is None else torch.from_numpy(inverse),
            shared_lam=float(lam[0]) if lam.shape == (1,) else None,
        )

    def _draw_layer(self, rng: np.random.Generator) -> int:
        if self.weights is None:
            return int(rng.integers(len(self.layers)))
        cumulative = np.cumsum(plain(self.weights))
        return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))

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

    def draw(self, batch_size: int, *, epoch: int = 0, batch_index: int = 0, rank: int = 0) -> MixPlan:
        """Return a plan that :meth:`PlanSource.draw` has drawn from the same arguments, not returned before."""
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


def _inverse(partner: np.ndarray) -> np.ndarray | None:
    rows = np.arange(len(partner))
    inverse = np.zeros_like(partner)
    inverse[partner] = rows
    return inverse if np.array_equal(partner[inverse], rows) else None


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.stride(0) == 0:  # one lam for the whole batch: move one number and keep it one number
        return _move(tensor[0].clone().view(1), device).expand(tensor.shape)
    # Pinned memory lets the copy overlap with the device's work instead of waiting for it.
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=device.type == "cuda")
