"""The diagram of a classifier's reliability: how often it is right where it claims so much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

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
from mm_lightning.evaluation.scores import Reliability, accuracy_intervals

CAPTIONS = {  # of the picture; the arrow points to the better value
    "ece": ("ECE ↓", "{:.3f}"),
    "mce": ("MCE ↓", "{:.3f}"),
    "overconfidence": ("conf. − acc.", "{:+.3f}"),
    "nll": ("NLL ↓", "{:.3f}"),
    "brier": ("Brier ↓", "{:.3f}"),
}
TOO_SURE, TOO_UNSURE = PALETTE[3], PALETTE[2]


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
