"""Reliability of several methods beside each other, from one run of each or from several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mm_lightning.diagnostics.drawing import add_legend, add_panel, titled_figure, write_numbers, write_titles
from mm_lightning.diagnostics.reliability import captions, draw_reliability
from mm_lightning.evaluation.scores import Reliability

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
    figure = titled_figure(width, height, heading, _LEFT)
    most = max(bins.counts.max() for bins in diagrams.values())
    for place, (title, bins) in enumerate(diagrams.items()):
        row, column = divmod(place, columns)
        left, bottom = _LEFT + column * (_SIDE + _GAP), (rows - 1 - row) * step + foot
        lower = add_panel(figure, left, bottom, _SIDE, _LOW)
        upper = add_panel(figure, left, bottom + _LOW + _BETWEEN, _SIDE, _SIDE)
        draw_reliability(upper, lower, bins, most, column == 0)
        write_titles(upper, title)
        write_numbers(lower, captions(numbers[title]) if numbers else {}, (0.726, 0.902), size=12)
    add_legend(figure, upper, _LEFT, 0.38, ncols=3)
    return figure
