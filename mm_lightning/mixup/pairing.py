"""WHO is mixed with whom? A pairing draws the partner of every row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["RandomPermutation", "Roll"]


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
