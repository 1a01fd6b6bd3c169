"""Whether near hidden states are of the same class: k nearest neighbours among the training rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_lightning.arguments import check_count, check_flag
from mm_lightning.evaluation.rows import checked

__all__ = ["Neighbours", "neighbour_accuracy"]


@dataclass(frozen=True)
class Neighbours:
    """How nearest neighbours are searched, as :func:`neighbour_accuracy` does.

    Attributes:
        k: Neighbours, >= 1.
        cosine: Whether rows are compared by the cosine of their angle, not by their Euclidean distance.
        layer: Dotted name of the layer whose output is searched; ``"NAME:input"`` is what comes into it. None is what
            comes into the last Linear layer.
    """

    k: int = 5
    cosine: bool = True
    layer: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        check_count("k", self.k, 1, "5 is usual.")
        check_flag("cosine", self.cosine, "False takes Euclidean distances.")

    def __call__(self, bank: Tensor, bank_targets: Tensor, hidden: Tensor, targets: Tensor) -> float:
        """Return the accuracy."""
        return neighbour_accuracy(bank, bank_targets, hidden, targets, self.k, self.cosine)


def neighbour_accuracy(
    bank: Tensor,
    bank_targets: Tensor,
    hidden: Tensor,
    targets: Tensor,
    k: int = 5,
    cosine: bool = True,
    chunk: int = 10_000_000,
) -> float:
    """Classify rows by the most frequent class of their k nearest rows of a bank, and return the share that is right.

    Of classes that are as frequent, the one of the nearest row among them is taken. Distances are computed in float32,
    or in float64 if the rows are that.

    Args:
        bank: Hidden states of training rows, (M, D), finite.
        bank_targets: Their class indices, integer, (M,).
        hidden: Hidden states of the rows to classify, (N, D), finite.
        targets: Their class indices, (N,).
        k: Neighbours, 1 to M.
        cosine: Whether rows are compared by the cosine of their angle, not by their Euclidean distance.
        chunk: Distances held in memory at a time, at least a row's M.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or there are fewer than k rows in the bank.

    Example:
        >>> bank, classes = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1])
        >>> neighbour_accuracy(bank, classes, torch.tensor([[0.1, 2.0]]), torch.tensor([0]), k=1)
        1.0
    """
    (bank, bank_targets), (hidden, targets) = checked(bank, bank_targets), checked(hidden, targets)
    check_count("k", k, 1, "5 is usual.")
    if bank.shape[1] != hidden.shape[1]:
        raise ValueError(f"bank and hidden must be as wide, got {bank.shape[1]} and {hidden.shape[1]}.")
    if k > len(bank):
        raise ValueError(f"k must be at most the {len(bank)} rows of the bank, got {k}.")
    dtype = torch.promote_types(torch.promote_types(bank.dtype, hidden.dtype), torch.float32)
    bank, hidden = bank.to(dtype), hidden.to(dtype)
    if cosine:
        bank, hidden = F.normalize(bank, dim=1), F.normalize(hidden, dim=1)
    classes, places = bank_targets.unique(return_inverse=True)
    right = 0
    rows = max(1, chunk // len(bank))
    for part, own in zip(hidden.split(rows), targets.split(rows), strict=True):
        # differences, not |a|^2 - 2ab + |b|^2, which loses near rows to rounding
        distances = -(part @ bank.T) if cosine else torch.cdist(part, bank, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = places[distances.topk(k, dim=1, largest=False).indices]  # (n, k), nearest first
        votes = F.one_hot(nearest, len(classes)).sum(dim=1)
        is_most = votes.gather(1, nearest) == votes.amax(dim=1, keepdim=True)
        chosen = nearest.gather(1, is_most.int().argmax(dim=1, keepdim=True))[:, 0]
        right += int((classes[chosen] == own).sum())
    return right / len(hidden)
