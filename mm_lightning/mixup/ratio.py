"""HOW MUCH? The ratio lam of a row itself against its partner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np

__all__ = ["BetaRatio"]


@dataclass(frozen=True)
class BetaRatio:
    """Draws ``lam ~ Beta(alpha, alpha)`` (Verma et al., 2019, section 2).

    The paper uses 2.0 on CIFAR and SVHN, 0.2 on Tiny-ImageNet. Small values keep most batches nearly unmixed
    (``lam`` close to 0 or 1), large ones mix half and half.

    Args:
        alpha: Both parameters of the Beta distribution, >= 0. 0 switches mixing off.
        per_sample: Draw one ``lam`` for every row instead of one for the batch. The paper reports the same accuracy.

    Raises:
        ValueError: If ``alpha`` is negative, infinite or not a number.
        TypeError: If ``alpha`` is not a real number.
    """

    alpha: float = 2.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real):
            raise TypeError(f"alpha must be a number >= 0, got {self.alpha!r} of type {type(self.alpha).__name__}.")
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha must be a finite number >= 0, got {self.alpha}. 0 switches mixing off.")

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
        return rng.beta(self.alpha, self.alpha, size=size)
