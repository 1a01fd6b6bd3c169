"""WHO is mixed with whom? A pairing draws the partner of every row."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_integer, check_number, refusal
from mm_lightning.mixup.batch import check_leaf_name, leaf_named
from mm_lightning.mixup.seen import check_asks, precise, vectors_of

__all__ = [
    "ConfidentWithUnconfident",
    "FromBatch",
    "LabelDistance",
    "MatchedGroups",
    "NearestNeighbors",
    "OtherClass",
    "Pairing",
    "RandomPermutation",
    "Roll",
    "SameClass",
    "check_pairing",
]

_BLOCK = 128  # rows

# It returns row numbers; but a return type would let LightningCLI take that, and no instance of a class that draws.
Pairing = Callable[..., Any]


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


@dataclass(frozen=True)
class SameClass:
    """Pairs each row with a random one of its own class: labels stay pure, and only features are mixed.

    A permutation. A row that is alone in its class is its own partner.
    """

    def __call__(self, rng: np.random.Generator, batch_size: int, targets: Tensor) -> Tensor:
        """Draw partners.

        Args:
            rng: Source of randomness.
            batch_size: Number of rows, N.
            targets: Class indices (N,), or probabilities or scores of classes (N, K), whose largest counts.

        Returns:
            int64 (N,).
        """
        classes = _classes(self, targets)
        # Two random orders, each sorted by class: the classes' blocks stand in the same places of both.
        own, partner = (order[classes[order].argsort(stable=True)] for order in _orders(rng, batch_size, classes, 2))
        return torch.empty_like(own).scatter_(0, own, partner)


@dataclass(frozen=True)
class OtherClass:
    """Pairs each row with a random one of another class. Several rows may share a partner.

    Where all rows are of one class, each is its own partner.
    """

    def __call__(self, rng: np.random.Generator, batch_size: int, targets: Tensor) -> Tensor:
        """Draw partners, as :meth:`SameClass.__call__`."""
        classes = _classes(self, targets)
        return _drawn_by((classes[:, None] != classes).float(), rng)


@dataclass(frozen=True)
class LabelDistance:
    """C-Mixup: pairs rows with close labels, for regression (Yao et al., NeurIPS 2022).

    Row j is the partner of row i with a probability proportional to ``exp(-d(y_i, y_j)**2 / (2 * bandwidth**2))``,
    where d is the Euclidean distance (equation 6). Several rows may share a partner, and a row may be its own. The
    paper draws from the whole data set, this from the batch.

    Args:
        bandwidth: Sigma, > 0, in units of the targets.

    Raises:
        ValueError: If it is not positive and finite.
        TypeError: If it is no number.
    """

    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        way_out = "It is a distance of targets."
        check_number("bandwidth", self.bandwidth, "a finite number > 0", lambda b: 0 < b < math.inf, way_out)

    def __call__(self, rng: np.random.Generator, batch_size: int, targets: Tensor) -> Tensor:
        """Draw partners.

        Args:
            rng: Source of randomness.
            batch_size: Number of rows, N.
            targets: Numbers, (N, ...).

        Returns:
            int64 (N,).
        """
        labels = precise(targets.detach()).reshape(batch_size, -1)
        return _drawn_by((-_squared_distances(labels) / (2 * self.bandwidth**2)).exp(), rng)


@dataclass(frozen=True)
class NearestNeighbors:
    """Pairs each row with one of its nearest others in the mixed layer, drawn at random.

    Several rows may share a partner.

    Args:
        count: How many of the nearest a partner is drawn from, >= 1.

    Raises:
        ValueError: If it is below 1.
        TypeError: If it is no integer.
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_integer("count", self.count, "an integer >= 1", lambda n: n >= 1, "1 is the nearest alone.")

    def __call__(self, rng: np.random.Generator, batch_size: int, hidden: Tensor) -> Tensor:
        """Draw partners.

        Args:
            rng: Source of randomness.
            batch_size: Number of rows, N.
            hidden: Hidden states of the layer, (N, ...), compared by their Euclidean distance.

        Returns:
            int64 (N,).
        """
        distance = _squared_distances(vectors_of(hidden)).fill_diagonal_(math.inf)
        count = max(1, min(self.count, batch_size - 1))  # a batch of one is its own partner
        if count == 1:
            return distance.argmin(dim=1)
        nearest = distance.topk(count, largest=False).indices  # (N, count)
        drawn = torch.from_numpy(rng.integers(count, size=(batch_size, 1))).to(nearest.device)
        return nearest.gather(1, drawn)[:, 0]


@dataclass(frozen=True)
class MatchedGroups:
    """k-mixup: matches groups of k rows with others so that the distances are least (Greenewald et al., 2021).

    The batch is shuffled and cut into groups of k, and each group's rows are assigned to those of the next group with
    the least sum of squared distances in the mixed layer. A permutation in which no row is its own partner; with
    ``size=1`` it is a random one. The assignment is scipy's, on the CPU, for which the device is waited for.

    Args:
        size: Rows of a group, k >= 1; in smaller batches half of the rows.

    Raises:
        ValueError: If it is below 1.
        TypeError: If it is no integer.
        ImportError: If scipy is not installed.
    """

    size: int = 16

    def __post_init__(self) -> None:
        check_integer("size", self.size, "an integer >= 1", lambda n: n >= 1, "1 pairs at random.")
        _assign()

    def __call__(self, rng: np.random.Generator, batch_size: int, hidden: Tensor) -> np.ndarray:
        """Draw partners, as :meth:`NearestNeighbors.__call__`."""
        size = max(1, min(self.size, batch_size // 2))  # else a group would be matched with itself
        own = rng.permutation(batch_size)
        other = np.roll(own, -size)
        distance = _squared_distances(vectors_of(hidden)).cpu().numpy()
        partner = np.empty(batch_size, dtype=np.int64)
        for begin in range(0, batch_size, size):
            rows, others = own[begin : begin + size], other[begin : begin + size]
            places, columns = _assign()(distance[np.ix_(rows, others)])
            partner[rows[places]] = others[columns]
        return partner


@dataclass(frozen=True)
class ConfidentWithUnconfident:
    """Pairs the rows that the network is surest of with those that it is least sure of.

    Ordered by the probability of the predicted class, the first row and the last are each other's partners, the second
    and the last but one, and so on: a permutation. The network's scores are those of the unmixed batch, which costs a
    forward pass of its own.
    """

    def __call__(self, rng: np.random.Generator, batch_size: int, logits: Tensor) -> Tensor:
        """Draw partners.

        Args:
            rng: Not used.
            batch_size: Number of rows, N.
            logits: The network's scores of the unmixed batch, (N, K).

        Returns:
            int64 (N,).
        """
        order = logits.detach().softmax(dim=1).amax(dim=1).argsort(stable=True)
        return torch.empty_like(order).scatter_(0, order, order.flip(0))


@dataclass(frozen=True)
class FromBatch:
    """Takes the partners from a field of the batch, where the data know who belongs together.

    Args:
        field: Where in the batch, with dots between keys, attributes and positions: ``"partner"``, ``"2"``,
            ``"meta.partner"``.

    Raises:
        TypeError: If it is no string.
    """

    field: str | int = "partner"

    def __post_init__(self) -> None:
        check_leaf_name("field", self.field, "Give 'partner', say.")

    def __call__(self, rng: np.random.Generator, batch_size: int, batch: Any) -> Any:
        """Return the field.

        Args:
            rng: Not used.
            batch_size: Number of rows, N.
            batch: The batch.

        Returns:
            int64 (N,): the row of this batch that is mixed into row i.

        Raises:
            ValueError: If there is no such field.
        """
        return leaf_named(batch, self.field, "field")


def check_pairing(pairing: Any) -> None:
    """Raise TypeError unless ``pairing`` can be called; a class such as ``Roll`` in the place of ``Roll()`` is none."""
    if isinstance(pairing, type) or not callable(pairing):
        expected = "a function of a numpy.random.Generator and the number of rows"
        raise refusal("pairing", pairing, expected, "Give RandomPermutation() or Roll().")
    check_asks("pairing", pairing)


def _classes(pairing: Any, targets: Tensor) -> Tensor:
    """Class indices (N,)."""
    classes = targets.argmax(dim=1) if targets.dim() == 2 and targets.shape[1] > 1 else targets
    classes = classes[:, 0] if classes.dim() == 2 else classes
    if classes.dim() != 1 or classes.is_floating_point():
        raise ValueError(
            f"{pairing!r} needs classes as targets, (N,) integers or (N, K), got {targets.dtype} of shape "
            f"{tuple(targets.shape)}. For numbers use LabelDistance(bandwidth)."
        )
    return classes


def _orders(rng: np.random.Generator, rows: int, like: Tensor, count: int) -> list[Tensor]:
    return [torch.from_numpy(rng.permutation(rows)).to(like.device) for _ in range(count)]


def _drawn_by(weights: Tensor, rng: np.random.Generator) -> Tensor:
    """For each row one column, with a probability proportional to its weight, (N, N) -> (N,); itself if all are 0."""
    rows = len(weights)
    total = weights.cumsum(dim=1)
    drawn = torch.from_numpy(rng.random((rows, 1))).to(weights) * total[:, -1:]
    column = torch.searchsorted(total, drawn, right=True).squeeze(1)
    return torch.where(total[:, -1] > 0, column.clamp_max(rows - 1), torch.arange(rows, device=weights.device))


def _squared_distances(rows: Tensor) -> Tensor:
    """Between all rows, (N, D) -> (N, N)."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = rows - rows.mean(dim=0)  # |a|^2 - 2ab + |b|^2 loses the digits of close rows: of centred ones the fewest
    products = rows.new_empty(len(rows), len(rows))
    for begin in range(0, len(rows), _BLOCK):  # a block of rows with those up to it: the other half is the same
        end = min(begin + _BLOCK, len(rows))
        torch.mm(rows[begin:end], rows[:end].T, out=products[begin:end, :end])
        products[:begin, begin:end] = products[begin:end, :begin].T
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp_min_(0)


def _assign() -> Any:
    try:
        return importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "MatchedGroups assigns rows with scipy, which is not installed. Install it, or use NearestNeighbors()."
        ) from error
