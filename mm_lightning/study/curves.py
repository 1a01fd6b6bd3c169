"""How the methods of a study learn: a validation's metric, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from mm_lightning.diagnostics.drawing import add_legend, add_panel, save_figure, titled_figure
from mm_lightning.study.form import Picture
from mm_lightning.study.spectra import STYLES

__all__ = ["draw_curves"]


def draw_curves(curves: Mapping[str, Sequence[Mapping[int, float | None]]], key: str, path: Path) -> Picture:
    """Draw a line for each method, the mean over its seeds, and a band from the smallest to the largest of them.

    Args:
        curves: By title of the method, for each seed the values by epoch; None and NaN leave a gap.
        key: Of the metric.
        path: Of the picture.

    Returns:
        The picture, with its file relative to its folder.
    """
    left, wide, high, bottom = 0.85, 7.2, 3.9, 0.6  # inches
    rows = -(-len(curves) // 2)
    figure = titled_figure(left + wide + 0.2, high + bottom + 0.55 + 0.2 * rows, f"{key}, by epoch", left)
    axes = add_panel(figure, left, bottom, wide, high)
    for place, (title, seeds) in enumerate(curves.items()):
        epochs = sorted(set.intersection(*(set(seed) for seed in seeds)))
        values = np.array([[seed[epoch] for epoch in epochs] for seed in seeds], dtype=float)  # (S, E)
        style: dict[str, Any] = {"lw": 1.6, "ms": 4, "mew": 0, **STYLES[place % len(STYLES)]}
        axes.plot(epochs, values.mean(axis=0), label=title, markevery=max(1, len(epochs) // 8), **style)
        if len(seeds) > 1:
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.1, lw=0)
    axes.set(xlabel="epoch", ylabel=key)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, axes, left, 0.37, ncols=2, fontsize=9, handlelength=3)
    save_figure(figure, path)
    return Picture(
        file=path.name,
        title="How they learn",
        caption=(
            f"{key} after each validation: the line is the mean over the seeds, the band reaches from the smallest to "
            "the largest of them. Training on mixed data is slower; what counts is where the lines end."
        ),
        alt=f"{key} by epoch, a line for each of {', '.join(curves)}",
        commands=[],
    )
