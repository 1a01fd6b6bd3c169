"""Reliability of several methods beside each other, from one run of each or from several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mm_lightning.diagnostics.figures import INK
from mm_lightning.diagnostics.reliability import Reliability, _draw_bars, _draw_counts, _write_numbers

_SIDE, _LOW, _GAP, _BETWEEN, _LEFT, _RIGHT, _HEAD, _FOOT = 3.2, 1.1, 0.3, 0.3, 0.8, 0.15, 0.95, 1.0  # inches


def pooled(seeds: Sequence[Reliability]) -> Reliability:
    """Put the rows of several runs into the same bins.

    Args:
        seeds: With the same edges, at least one.

    Raises:
        ValueError: If the edges differ.
    """
    if not all(np.array_equal(bins.edges, seeds[0].edges) for bins in seeds):
        raise ValueError(f"seeds must have the same bins, got {[len(bins.counts) for bins in seeds]} bins.")
    counts = np.sum([bins.counts for bins in seeds], axis=0)

    def mean(name: str) -> np.ndarray:  # of all rows of a bin; an empty one of a run has NaN and no rows
        total = np.sum([np.nan_to_num(getattr(bins, name)) * bins.counts for bins in seeds], axis=0)
        return np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)

    return Reliability(seeds[0].edges, counts, mean("confidence"), mean("accuracy"))


def draw_reliability_of_methods(
    diagrams: Mapping[str, Reliability],
    numbers: Mapping[str, Mapping[str, float]] | None = None,
    heading: str = "Reliability",
) -> Figure:
    """Draw a reliability diagram per method, at most three in a row, all on the same axes.

    How to read one says :func:`draw_reliability_diagrams`.

    Args:
        diagrams: By title of the method.
        numbers: What is written below each: numbers of :func:`calibration_numbers`, by name.
        heading: Of the figure.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    rows = -(-len(diagrams) // 3)
    columns = -(-len(diagrams) // rows)
    foot = _FOOT if numbers else 0.5
    step = 0.35 + _SIDE + _BETWEEN + _LOW + foot  # a row with its titles
    width, height = _LEFT + columns * (_SIDE + _GAP) - _GAP + _RIGHT, _HEAD - 0.35 + rows * step
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    points = min(13.0, 72 * (width - _LEFT - _RIGHT) / (0.68 * len(heading) + 1))  # a bold letter is about 0.68 em wide
    figure.text(_LEFT / width, 1 - 0.12 / height, heading, va="top", fontsize=points, weight="bold", color=INK)
    most = max(bins.counts.max() for bins in diagrams.values())
    for place, (title, bins) in enumerate(diagrams.items()):
        row, column = divmod(place, columns)
        left, bottom = _LEFT + column * (_SIDE + _GAP), (rows - 1 - row) * step + foot
        lower = figure.add_axes((left / width, bottom / height, _SIDE / width, _LOW / height))
        upper = figure.add_axes((left / width, (bottom + _LOW + _BETWEEN) / height, _SIDE / width, _SIDE / height))
        _draw_bars(upper, bins)
        _draw_counts(lower, bins, most)
        upper.set_title(title, loc="left", fontsize=11, color=INK)
        for axes, label in ((upper, "accuracy"), (lower, "rows")):
            axes.set_ylabel(label if column == 0 else "")
            axes.tick_params(labelleft=column == 0)
        _write_numbers(lower, numbers[title] if numbers else {})
    handles, labels = figure.axes[1].get_legend_handles_labels()
    place_of: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": ((_LEFT - 0.08) / width, 1 - 0.38 / height)}
    figure.legend(handles, labels, ncols=3, borderpad=0, frameon=False, fontsize=8.5, labelcolor=INK, **place_of)
    return figure
