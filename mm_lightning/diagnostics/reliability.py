"""Reliability of a classifier's probabilities: rows in bins, calibration errors, and the diagram of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from mm_lightning.arguments import check_count
from mm_lightning.diagnostics.drawing import (
    GREY,
    INK,
    PALETTE,
    add_legend,
    add_panel,
    label_outer,
    titled_figure,
    write_numbers,
    write_titles,
)

CAPTIONS = {  # of the picture; the arrow points to the better value
    "ece": ("ECE ↓", "{:.3f}"),
    "mce": ("MCE ↓", "{:.3f}"),
    "overconfidence": ("conf. − acc.", "{:+.3f}"),
    "nll": ("NLL ↓", "{:.3f}"),
    "brier": ("Brier ↓", "{:.3f}"),
}
TOO_SURE, TOO_UNSURE = PALETTE[3], PALETTE[2]


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


def draw_reliability_diagrams(
    diagrams: Sequence[Reliability],
    titles: Sequence[str],
    numbers: Sequence[Mapping[str, float]] = (),
    heading: str = "Reliability",
) -> Figure:
    """Draw reliability diagrams side by side, all on the same axes.

    How to read it: a bar is the fraction of a bin's rows that are right. The hatched part between the bar's end and
    the bin's mean confidence is the gap that calibration errors measure: on top of the bar where the classifier is too
    sure, inside it where it is too unsure. Perfect bars reach the diagonal. Below are the rows in each bin, on a
    log axis, because most rows tend to be in the last one. A bar made of few rows says little, and is faint: its
    opacity is one minus the width of the 95 % interval of its accuracy, which the upright line shows. Two lines mark
    the accuracy and the mean confidence of all rows.

    Args:
        diagrams: One for each panel, from left to right.
        titles: Of the panels.
        numbers: What is written below each panel: numbers of :func:`calibration_numbers`, by name.
        heading: Heading of the figure.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    side, low, gap, left, right, bottom, top, between = 3.6, 1.15, 0.3, 0.8, 0.15, 1.05, 0.95, 0.32  # inches
    width, height = left + len(diagrams) * (side + gap) - gap + right, top + side + between + low + bottom
    figure = titled_figure(width, height, heading, left)
    most = max(bins.counts.max() for bins in diagrams)
    for column, bins in enumerate(diagrams):
        corner = left + column * (side + gap)
        upper = add_panel(figure, corner, bottom + low + between, side, side)
        lower = add_panel(figure, corner, bottom, side, low)
        draw_reliability(upper, lower, bins, most, column == 0)
        write_titles(upper, titles[column], f"{bins.counts.sum():,} rows")
        write_numbers(lower, captions(numbers[column]) if numbers else {}, (0.759, 0.943), size=12)
    add_legend(figure, upper, left, 0.38, ncols=3, columnspacing=1.4)
    return figure


def draw_reliability(upper: Axes, lower: Axes, bins: Reliability, most: int, is_left: bool) -> None:
    """Draw a reliability diagram, and below it the rows in each bin.

    Args:
        upper: For the diagram.
        lower: For the rows.
        bins: What is drawn.
        most: Rows in the fullest bin of all diagrams with these axes.
        is_left: Whether the axes are labelled here, not in a diagram to the left.
    """
    _draw_bars(upper, bins)
    _draw_counts(lower, bins, most)
    label_outer(upper, is_left, is_lowest=False)
    label_outer(lower, is_left)


def captions(numbers: Mapping[str, float]) -> dict[str, str]:
    """Return numbers of :func:`calibration_numbers` as they are written below a diagram."""
    texts = {name: text.format(numbers[key]) for key, (name, text) in CAPTIONS.items() if key in numbers}
    return {name: text.replace("-", "−") for name, text in texts.items()}


def _check(probabilities: Tensor, targets: Tensor, num_bins: int) -> None:
    check_count("num_bins", num_bins, 1, "15 is usual.")
    if probabilities.ndim != 2 or not len(probabilities) or targets.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"probabilities must be (N, K) and targets (N,), with N >= 1, got {shapes}.")
    total = probabilities.double().sum(dim=1)
    if not (probabilities >= 0).all() or not ((total - 1).abs() < 1e-2).all():
        ends = f"values from {probabilities.min():.4g} and sums from {total.min():.4g} to {total.max():.4g}"
        raise ValueError(f"probabilities must be >= 0 and sum to 1 in each row, got {ends}. Are they logits?")
    if targets.min() < 0 or targets.max() >= probabilities.shape[1]:
        classes = probabilities.shape[1]
        raise ValueError(f"targets must be in [0, {classes}), got {targets.min()} to {targets.max()}.")


def _draw_bars(axes: Axes, bins: Reliability) -> None:
    left, width = bins.edges[:-1], np.diff(bins.edges)
    low, high = accuracy_intervals(bins)
    accuracy = axes.bar(left, bins.accuracy, width, align="edge", color="#c9d8ee", edgecolor="white", lw=0.6)
    accuracy.set_label("accuracy")
    gap = bins.confidence - bins.accuracy
    too_sure = axes.bar(left, np.where(gap > 0, gap, np.nan), width, bins.accuracy, align="edge", hatch="////")
    too_sure.set_label("gap: too sure")
    too_unsure = axes.bar(left, np.where(gap < 0, gap, np.nan), width, bins.accuracy, align="edge", hatch="\\\\\\\\")
    too_unsure.set_label("gap: too unsure")
    for bars, colour in ((too_sure, TOO_SURE), (too_unsure, TOO_UNSURE)):
        for bar in bars:
            bar.set(facecolor="none", edgecolor=colour, linewidth=1.0)
            if hasattr(bar, "set_hatch_linewidth"):  # since matplotlib 3.10; before it is always 1
                bar.set_hatch_linewidth(0.8)
    for bars in (accuracy, too_sure, too_unsure):
        for bar, opacity in zip(bars, 1 - np.nan_to_num(high - low), strict=True):
            bar.set_alpha(opacity)
    axes.vlines(left + width / 2, low, high, color=GREY, lw=0.8)
    axes.plot([0, 1], [0, 1], color=INK, lw=1.0, ls=(0, (4, 3)))
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")


def _draw_counts(axes: Axes, bins: Reliability, most: int) -> None:
    axes.bar(
        bins.edges[:-1], bins.counts, np.diff(bins.edges), align="edge", color="#a9b3be", edgecolor="white", lw=0.6
    )
    share = bins.counts / bins.counts.sum()
    for each, name, dashes in ((bins.accuracy, "accuracy", "-"), (bins.confidence, "mean confidence", "--")):
        mean = np.nansum(share * each)
        axes.axvline(mean, color=INK, lw=1.2, ls=dashes, label=f"{name} {mean:.1%}")
    axes.set(xlim=(0, 1), yscale="log", ylim=(0.7, 2 * most), ylabel="rows")
    axes.set_xlabel("confidence: probability of the class predicted")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.98), "borderpad": 0, "borderaxespad": 0.3}
    axes.legend(ncols=2, frameon=False, fontsize=8.5, labelcolor=INK, columnspacing=1.4, **place)
