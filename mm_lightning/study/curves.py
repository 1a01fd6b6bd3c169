"""How the methods of a study learn: a validation's metric, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mm_lightning.diagnostics.drawing import (
    GREY,
    INK,
    PALETTE,
    add_legend,
    add_panel,
    label_outer,
    save_figure,
    titled_figure,
)
from mm_lightning.study.form import Picture

__all__ = ["draw_curves", "picture_of_curves"]

_BEGINNING = 0.5  # of training, whose values may lie outside of the panels: what counts is how the lines end
_METHOD: dict[str, Any] = {"color": PALETTE[0], "lw": 1.8, "ms": 4}
_FIRST: dict[str, Any] = {"color": INK, "lw": 1.1, "ms": 3, "ls": (0, (3, 1.5))}
_EDGE: dict[str, Any] = {"color": GREY, "lw": 0.8, "ls": (0, (1, 1.5))}


class _Curve(NamedTuple):
    epochs: list[int]  # that all seeds have, rising, (E,)
    values: np.ndarray  # NaN where there is none, (S, E)

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest seed, (E,) each."""
        return self.values.min(axis=0), self.values.max(axis=0)


def draw_curves(curves: Mapping[str, Sequence[Mapping[int, float | None]]], key: str) -> Figure:
    """Draw a panel for each method, with its own line and that of the first one, which all are held against.

    How to read it: the solid line is a method's mean over its seeds, its band reaches from the smallest to the largest
    of them. The dashed line is the first method's mean, and the dotted lines are its smallest and largest seed. Above a
    panel stands how far apart solid and dashed line end. All panels share their axes, which hold all of the second half
    of training; what lies outside of them before is cut off.

    Args:
        curves: By title of the method, for each seed the values by epoch; None and NaN leave a gap. Two methods or
            more.
        key: Of the metric.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    drawn = {title: _curve(seeds) for title, seeds in curves.items()}
    (name, first), *methods = drawn.items()
    columns = 2 if len(methods) == 4 else min(3, len(methods))
    rows = -(-len(methods) // columns)
    wide, high = 2.45 if columns > 1 else 5.1, 1.75  # inches, as all that follow
    left, bottom, top, gap, between = 0.8, 0.55, 1.25, 0.2, 0.55
    width, height = left + columns * (wide + gap), top + rows * (high + between) - between + bottom
    figure = titled_figure(width, height, f"{key}, by epoch", left)
    limits = _limits(list(drawn.values()))
    size = min(10.5, *(72 * wide / (0.54 * len(title)) for title, _ in methods))  # points; a letter is 0.54 em wide
    for place, (title, curve) in enumerate(methods):
        row, column = divmod(place, columns)
        corner = left + column * (wide + gap), bottom + (rows - 1 - row) * (high + between)
        axes = add_panel(figure, *corner, wide, high)
        _draw_lines(axes, curve, first, name)
        axes.set(**limits, xlabel="epoch", ylabel=key)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        label_outer(axes, is_left=column == 0, is_lowest=place + columns >= len(methods))
        _write_above(axes, title, 17, size, INK)
        _write_above(axes, _end(curve, first, name, limits), 5, 8.5, GREY)
    add_legend(figure, figure.axes[0], left, 0.38, ncols=2, handlelength=2.6, columnspacing=2.0)
    return figure


def picture_of_curves(curves: Mapping[str, Sequence[Mapping[int, float | None]]], key: str, path: Path) -> Picture:
    """Write what :func:`draw_curves` draws to a file, and say what it shows.

    Args:
        curves: As there.
        key: The same.
        path: Of the picture.

    Returns:
        The picture, with its file relative to its folder.
    """
    save_figure(draw_curves(curves, key), path)
    first, *methods = curves
    return Picture(
        file=path.name,
        title="How they learn",
        caption=(
            f"{key} after each validation, a panel for each method: the solid line is its mean over the seeds, the "
            f"band reaches from the smallest to the largest of them; dashed is {first}, dotted its smallest and "
            "largest seed. All panels have the same axes, which hold the second half of training; what lies outside "
            "of them before is cut off. Training on mixed data is slower; what counts is where the lines end."
        ),
        alt=f"{key} by epoch, a panel for each of {', '.join(methods)}, each against {first}",
        commands=[],
    )


def _curve(seeds: Sequence[Mapping[int, float | None]]) -> _Curve:
    epochs = sorted(set.intersection(*(set(seed) for seed in seeds)))
    values = np.array([[seed[epoch] for epoch in epochs] for seed in seeds], dtype=float)
    return _Curve(epochs, np.where(np.isfinite(values), values, np.nan))


def _limits(curves: Sequence[_Curve]) -> dict[str, tuple[float, float]]:
    """The axes that hold all curves but for their beginning."""
    epochs = [epoch for curve in curves for epoch in curve.epochs]
    begin, end = min(epochs, default=0), max(epochs, default=1)
    late = begin + _BEGINNING * (end - begin)
    values = np.concatenate([curve.values[:, np.array(curve.epochs) >= late].ravel() for curve in curves])
    known = values[~np.isnan(values)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    beside, above = 0.03 * (end - begin) or 0.5, 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return {"xlim": (begin - beside, end + beside), "ylim": (low - above, high + above)}


def _draw_lines(axes: Axes, curve: _Curve, first: _Curve, name: str) -> None:
    marker = "o" if len(curve.epochs) == 1 else ""  # a line has no length then
    axes.plot(curve.epochs, curve.values.mean(axis=0), marker=marker, zorder=3, label="the method, mean", **_METHOD)
    if len(curve.values) > 1:
        to_largest = "from its smallest to its largest seed"
        axes.fill_between(curve.epochs, *curve.ends, color=_METHOD["color"], alpha=0.22, lw=0, label=to_largest)
    axes.plot(first.epochs, first.values.mean(axis=0), marker=marker, zorder=3, label=f"{name}, mean", **_FIRST)
    if len(first.values) > 1:
        smallest, largest = first.ends
        axes.plot(first.epochs, smallest, label="its smallest and its largest seed", **_EDGE)
        axes.plot(first.epochs, largest, **_EDGE)


def _end(curve: _Curve, first: _Curve, name: str, limits: Mapping[str, tuple[float, float]]) -> str:
    """How far above or below the first method a method ends, to a hundredth of the axis."""
    ends = [one.values[:, -1].mean() if one.epochs else np.nan for one in (curve, first)]
    if np.isnan(apart := ends[0] - ends[1]):
        return "no value at the end to compare"
    low, high = limits["ylim"]
    text = f"{abs(apart):.{max(0, 2 - math.floor(math.log10(high - low)))}f}"
    return f"ends {text} {'above' if apart > 0 else 'below'} {name}" if float(text) else f"ends where {name} does"


def _write_above(axes: Axes, text: str, points: float, size: float, colour: str) -> None:
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, (0, 1), (0, points), size=size, color=colour, **place)
