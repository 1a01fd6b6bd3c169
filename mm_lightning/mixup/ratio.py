"""HOW MUCH? The ratio lam of a row itself against its partner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mm_lightning.arguments import check_flag, check_number

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
        TypeError: If ``alpha`` is not a real number, or ``per_sample`` neither True nor False.
    """

    alpha: float = 2.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        check_number(
            "alpha", self.alpha, "a finite number >= 0", lambda alpha: 0 <= alpha < math.inf, "0 switches mixing off."
        )
        check_flag("per_sample", self.per_sample, "False draws one lam for the batch.")

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
