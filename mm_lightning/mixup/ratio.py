"""HOW MUCH? The ratio lam of a row itself against its partner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from mm_lightning.arguments import check_flag, check_number, refusal
from mm_lightning.mixup.seen import check_asks, precise, seen_by, vectors_of

__all__ = [
    "BetaRatio",
    "FixedRatio",
    "FoldedRatio",
    "Ratio",
    "SimilarityRatio",
    "UniformRatio",
    "alpha_of",
    "check_ratio",
    "is_by_row",
    "is_off",
    "with_alpha",
]

# It returns an ndarray; but a return type would let LightningCLI take that, and no instance of a class that draws.
Ratio = Callable[..., Any]


@dataclass(frozen=True)
class BetaRatio:
    """Draws ``lam ~ Beta(alpha, beta)``, with ``beta = alpha`` unless given (Verma et al., 2019, section 2).

    The paper uses 2.0 on CIFAR and SVHN, 0.2 on Tiny-ImageNet. Small values keep most batches nearly unmixed
    (``lam`` close to 0 or 1), large ones mix half and half. With ``alpha > beta`` the row itself has the larger part on
    average, ``alpha / (alpha + beta)``.

    Args:
        alpha: First parameter of the Beta distribution, >= 0. 0 switches mixing off.
        per_sample: Draw one ``lam`` for every row instead of one for the batch. The paper reports the same accuracy.
        beta: Second parameter, > 0; None is ``alpha``.

    Raises:
        ValueError: If a parameter is negative, infinite or not a number, or ``beta`` is 0.
        TypeError: If a parameter is not a real number, or ``per_sample`` neither True nor False.
    """

    alpha: float = 2.0
    per_sample: bool = False
    beta: float | None = None

    def __post_init__(self) -> None:
        check_number(
            "alpha", self.alpha, "a finite number >= 0", lambda alpha: 0 <= alpha < math.inf, "0 switches mixing off."
        )
        _check_per_sample(self.per_sample)
        if self.beta is not None:
            _check_positive("beta", self.beta, "None makes it alpha.")

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draw the ratios of one batch.

        Args:
            rng: Source of randomness.
            batch_size: Number of rows, N.

        Returns:
            float64 in [0, 1]: (N,) if ``per_sample``, else (1,). All ones if ``alpha`` is 0.
        """
        size = batch_size if self.per_sample else 1
        if self.alpha == 0:
            return np.ones(size)
        return rng.beta(self.alpha, self.alpha if self.beta is None else self.beta, size=size)


@dataclass(frozen=True)
class UniformRatio:
    """Draws ``lam`` evenly between two numbers; between 0 and 1 that is Beta(1, 1).

    Args:
        low: Smallest, in [0, 1].
        high: Largest, in [low, 1].
        per_sample: Draw one ``lam`` for every row.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If an argument is of a wrong type.
    """

    low: float = 0.0
    high: float = 1.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        _check_share("low", self.low)
        way_out = "1 is the row itself."
        check_number("high", self.high, "a number in [low, 1]", lambda high: self.low <= high <= 1, way_out)
        _check_per_sample(self.per_sample)

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draw the ratios of one batch, as :meth:`BetaRatio.__call__`."""
        return rng.uniform(self.low, self.high, size=batch_size if self.per_sample else 1)


@dataclass(frozen=True)
class FixedRatio:
    """The same ``lam`` in every batch.

    Args:
        lam: Weight of the row itself, in [0, 1].

    Raises:
        ValueError: If it is out of its range.
        TypeError: If it is no number.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        _check_share("lam", self.lam)

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Return ``lam``, (1,)."""
        return np.full(1, self.lam, dtype=np.float64)


@dataclass(frozen=True)
class FoldedRatio:
    """``max(lam, 1 - lam)`` of another ratio: the row itself is never the smaller part.

    Training accuracy on the row's own label then stays meaningful. With random partners the pairs are the same as
    without folding, each counted from its larger end.

    Args:
        ratio: Draws ``lam``; None is ``BetaRatio()``.

    Raises:
        TypeError: If ``ratio`` draws none.
    """

    ratio: Ratio = None  # type: ignore[assignment]  # not a default factory, whose dataclass LightningCLI takes apart

    def __post_init__(self) -> None:
        if self.ratio is None:
            object.__setattr__(self, "ratio", BetaRatio())
        check_ratio(self.ratio)
        if seen_by(self.ratio):
            raise TypeError(f"ratio must draw without seeing a batch, got {self.ratio!r}. Fold BetaRatio(alpha), say.")

    @property
    def per_sample(self) -> bool:
        """Whether every row has a ``lam`` of its own."""
        return is_by_row(self.ratio)

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draw the ratios of one batch, in [1/2, 1], as :meth:`BetaRatio.__call__`."""
        lam = np.asarray(self.ratio(rng, batch_size))
        return np.maximum(lam, 1 - lam)


@dataclass(frozen=True)
class SimilarityRatio:
    """Mixes similar rows more: ``lam_i ~ Beta(tau_i, tau_i)`` by the distance of the pair (Bouniot et al., ICLR 2025).

    ``tau_i = tau_max * exp(-(d_i - 1) / (2 * tau_std**2))``, where ``d_i`` is the squared distance of row i to its
    partner in the mixed layer, divided by its mean over the batch. A ``tau`` near 0 leaves a row nearly unmixed.

    The distances are read from the device, for which it is waited in every step.

    Args:
        tau_max: The ``tau`` of a pair at the mean distance, > 0.
        tau_std: How far from the mean distance pairs are mixed alike, > 0.

    Raises:
        ValueError: If a number is not positive and finite.
        TypeError: If one is no number.
    """

    tau_max: float = 1.0
    tau_std: float = 0.25
    per_sample = True

    def __post_init__(self) -> None:
        _check_positive("tau_max", self.tau_max, "1 is the paper's.")
        _check_positive("tau_std", self.tau_std, "0.25 is the authors' on CIFAR.")

    def __call__(self, rng: np.random.Generator, batch_size: int, hidden: Tensor, partner: Tensor) -> np.ndarray:
        """Draw the ratios of one batch.

        Args:
            rng: Source of randomness.
            batch_size: Number of rows, N.
            hidden: Hidden states of the layer, (N, ...).
            partner: Each row's partner, int64 (N,).

        Returns:
            float64 in [0, 1], (N,).
        """
        rows = precise(vectors_of(hidden))
        distance = (rows - rows[partner.to(rows.device)]).square().sum(dim=1).cpu().numpy()
        mean = distance.mean()
        relative = distance / mean if mean > 0 else np.ones_like(distance)
        with np.errstate(over="ignore"):
            tau = self.tau_max * np.exp(-(relative - 1) / (2 * self.tau_std**2))
        tau = tau.clip(1e-12, 1e12)  # at 0 and at infinity nothing can be drawn
        return rng.beta(tau, tau)


def is_by_row(ratio: Ratio) -> bool:
    """Whether a ratio draws one ``lam`` for every row."""
    known = getattr(ratio, "per_sample", None)
    if known is not None:
        return bool(known)
    return bool(seen_by(ratio)) or np.shape(ratio(np.random.default_rng(0), 3)) == (3,)


def is_off(ratio: Ratio) -> bool:
    """Whether a ratio is known to be 1 in every draw; what is 1 by chance is so on one process alone."""
    if isinstance(ratio, FoldedRatio):
        return is_off(ratio.ratio) or ratio.ratio == FixedRatio(0.0)
    return alpha_of(ratio) == 0 or ratio == FixedRatio(1.0) or (isinstance(ratio, UniformRatio) and ratio.low == 1)


def alpha_of(ratio: Ratio) -> float | None:
    """The ``alpha`` of a ratio, also inside of a folded one; None if it has none."""
    if isinstance(ratio, FoldedRatio):
        return alpha_of(ratio.ratio)
    return ratio.alpha if isinstance(ratio, BetaRatio) else None


def with_alpha(ratio: Ratio, alpha: float) -> Ratio:
    """A ratio with another ``alpha``, and a ``beta`` in the same proportion; also inside of a folded one.

    Raises:
        ValueError: If it has no ``alpha``.
    """
    if isinstance(ratio, FoldedRatio):
        return replace(ratio, ratio=with_alpha(ratio.ratio, alpha))
    if not isinstance(ratio, BetaRatio):
        raise ValueError(f"alpha is changed, but the ratio {ratio!r} has none. Give ratio=BetaRatio(alpha).")
    changed = replace(ratio, alpha=alpha)
    if ratio.beta is None or not (ratio.alpha > 0 and changed.alpha > 0):
        return changed
    return replace(changed, beta=ratio.beta * alpha / ratio.alpha)


def check_ratio(ratio: Any) -> None:
    """Raise TypeError unless ``ratio`` can be called; a class such as ``BetaRatio`` is no ratio."""
    if isinstance(ratio, type) or not callable(ratio):
        expected = "a function of a numpy.random.Generator and the number of rows"
        raise refusal("ratio", ratio, expected, "Give BetaRatio(alpha).")
    check_asks("ratio", ratio)


def _check_per_sample(per_sample: Any) -> None:
    check_flag("per_sample", per_sample, "False draws one lam for the batch.")


def _check_share(name: str, value: Any) -> None:
    check_number(name, value, "a number in [0, 1]", lambda share: 0 <= share <= 1, "1 is the row itself.")


def _check_positive(name: str, value: Any, way_out: str) -> None:
    check_number(name, value, "a finite number > 0", lambda number: 0 < number < math.inf, way_out)
