"""WHO is mixed with whom? A pairing draws the partner of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_lightning.arguments import refusal

__all__ = ["Pairing", "RandomPermutation", "Roll", "check_pairing"]

# It returns an ndarray; but a return type would let LightningCLI take that, and no instance of a class that draws.
Pairing = Callable[[np.random.Generator, int], Any]


@dataclass(frozen=True)
class RandomPermutation:
    """Pairs the batch with a random permutation of itself, as in the paper (section 2: the minibatch, shuffled).

    A row can be its own partner, which happens to one row a batch on average.
    """

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draw partners.

        Args:
            rng: Source of randomness.
            batch_size: Number of rows, N.

        Returns:
            int64 (N,): the row mixed into row i. A permutation of 0 ... N-1.
        """
        return rng.permutation(batch_size)


@dataclass(frozen=True)
class Roll:
    """Pairs row i with row (i + s) mod N for one random shift s in 1 ... N-1.

    Cheap and without self-pairs: enough where batches are shuffled anyway. A batch of one is its own partner.
    """

    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draw partners, as :meth:`RandomPermutation.__call__`."""
        shift = int(rng.integers(1, batch_size)) if batch_size > 1 else 0
        return (np.arange(batch_size) + shift) % batch_size


def check_pairing(pairing: Any) -> None:
    """Raise TypeError unless ``pairing`` can be called; a class such as ``Roll`` in the place of ``Roll()`` is none."""
    if isinstance(pairing, type) or not callable(pairing):
        expected = "a function of a numpy.random.Generator and the number of rows"
        raise refusal("pairing", pairing, expected, "Give RandomPermutation() or Roll().")
