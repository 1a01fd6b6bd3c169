"""How good a classifier's probabilities are: accuracy, likelihood, Brier score and calibration errors, by bins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_count
from mm_lightning.evaluation.rows import check_targets

__all__ = ["Reliability", "accuracy_intervals", "calibration_numbers", "reliability", "scores"]


def scores(log_probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> dict[str, float]:
    """Return the accuracy and the numbers of :func:`calibration_numbers`, in float64.

    ``acc`` is the share of rows whose most probable class is the target, in [0, 1]; of equal ones the first counts.

    Args:
        log_probabilities: Of each class, (N, K) with N >= 1. Logits become such by ``log_softmax(dim=1)``.
        targets: Class indices, integer, in [0, K), (N,).
        num_bins: Bins of equal width between 0 and 1.

    Returns:
        ``acc``, ``nll``, ``ece``, ``mce``, ``brier`` and ``overconfidence``.

    Raises:
        ValueError: If the shapes do not fit or a value is outside its range.

    Example:
        >>> scores(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))["ece"]
        0.25
    """
    log_probabilities, targets = log_probabilities.detach().cpu().double(), targets.detach().cpu().long()
    bins = reliability(log_probabilities.exp(), targets, num_bins)
    found = calibration_numbers(bins, log_probabilities, targets)
    acc = (log_probabilities.argmax(dim=1) == targets).double().mean().item()
    return {"acc": acc, **{name: found[name] for name in ("nll", "ece", "mce", "brier", "overconfidence")}}


class Reliability(NamedTuple):
    """Rows in bins of their top probability, of which there are B."""

    edges: np.ndarray  # from 0 to 1, float64, (B + 1,)
    counts: np.ndarray  # rows, int64, (B,)
    confidence: np.ndarray  # mean top probability; NaN in an empty bin, (B,)
    accuracy: np.ndarray  # fraction of the rows that are right; NaN in an empty bin, (B,)


def reliability(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> Reliability:
    """Sort rows into bins of equal width by the probability of the class predicted.

    Bin b of B holds the probabilities in (b / B, (b + 1) / B], so that 1 falls into the last bin; 0 falls into the
    first. The edges are rounded to the dtype of the probabilities before they are compared: the float32 number nearest
    to 0.2 is a little larger than 0.2, but lies on the edge 0.2 of five bins, and falls into the first.

    Args:
        probabilities: Of each class, in [0, 1], summing to 1 over the classes, (N, K) with N >= 1.
        targets: Class indices, integer, in [0, K), (N,).
        num_bins: B.

    Returns:
        The bins.

    Raises:
        ValueError: If the shapes do not fit or a value is outside its range.

    Example:
        >>> reliability(torch.tensor([[0.3, 0.7], [0.9, 0.1]]), torch.tensor([1, 1]), num_bins=2).accuracy
        array([nan, 0.5])
    """
    _check(probabilities, targets, num_bins)
    confidence, predicted = probabilities.detach().cpu().max(dim=1)
    edges = torch.arange(num_bins + 1, dtype=torch.float64) / num_bins
    upper = edges[1:].to(confidence.dtype).double()
    bins = torch.searchsorted(upper, confidence.double()).clamp(max=num_bins - 1).numpy()
    counts = np.bincount(bins, minlength=num_bins)
    right = (predicted == targets.detach().cpu()).double()
    sums = [np.bincount(bins, weights=each.double().numpy(), minlength=num_bins) for each in (confidence, right)]
    means = [np.divide(each, counts, out=np.full(num_bins, np.nan), where=counts > 0) for each in sums]
    return Reliability(edges.numpy(), counts, *means)


def accuracy_intervals(bins: Reliability) -> np.ndarray:
    """Return the 95 % interval of each bin's accuracy (Wilson 1927), (2, B): lower and upper end, NaN in an empty bin.

    Of a bin with n rows and accuracy a, with z = 1.96, the ends are
    (a + z^2 / 2n -+ z sqrt(a (1 - a) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    n, z = np.where(bins.counts > 0, bins.counts, np.nan), 1.96
    middle = bins.accuracy + z**2 / (2 * n)
    half = z * np.sqrt(bins.accuracy * (1 - bins.accuracy) / n + z**2 / (4 * n**2))
    return np.stack([middle - half, middle + half]) / (1 + z**2 / n)


def calibration_numbers(bins: Reliability, log_probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Sum up how well probabilities fit the outcomes.

    With n_b rows, mean confidence c_b and accuracy a_b in bin b, and N rows in all:

    - ``ece``: expected calibration error, sum over b of n_b / N * |c_b - a_b| (Guo et al. 2017).
    - ``mce``: maximum calibration error, max over b of |c_b - a_b|; one row alone in its bin can make it large.
    - ``overconfidence``: mean confidence minus accuracy, over all rows. Positive if the classifier is too sure.
    - ``nll``: mean of -log p of the target, in nats.
    - ``brier``: mean over the rows of the sum over all classes of (p - one-hot target)^2, in [0, 2].

    Args:
        bins: Of :func:`reliability`.
        log_probabilities: Of each class, (N, K).
        targets: Class indices, integer, in [0, K), (N,).

    Returns:
        The five numbers by name.
    """
    gaps, share = (bins.confidence - bins.accuracy)[bins.counts > 0], (bins.counts / bins.counts.sum())[bins.counts > 0]
    one_hot = torch.nn.functional.one_hot(targets, log_probabilities.shape[1])
    return {
        "ece": float(share @ np.abs(gaps)),
        "mce": float(np.abs(gaps).max()),
        "overconfidence": float(share @ gaps),
        "nll": torch.nn.functional.nll_loss(log_probabilities.double(), targets).item(),
        "brier": (log_probabilities.double().exp() - one_hot).square().sum(dim=1).mean().item(),
    }


def _check(probabilities: Tensor, targets: Tensor, num_bins: int) -> None:
    check_count("num_bins", num_bins, 1, "15 is usual.")
    if probabilities.ndim != 2 or not len(probabilities) or targets.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"probabilities must be (N, K) and targets (N,), with N >= 1, got {shapes}.")
    total = probabilities.double().sum(dim=1)
    if not (probabilities >= 0).all() or not ((total - 1).abs() < 1e-2).all():
        ends = f"values from {probabilities.min():.4g} and sums from {total.min():.4g} to {total.max():.4g}"
        raise ValueError(f"probabilities must be >= 0 and sum to 1 in each row, got {ends}. Are they logits?")
    check_targets(targets, probabilities.shape[1], may_be_ignored=False)
