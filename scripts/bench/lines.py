"""Lines over a logarithmic axis, each named at its end in the right margin of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mm_lightning.diagnostics.drawing import GREY, INK, add_panel
from mm_lightning.study.spectra import STYLES

__all__ = ["LEFT", "WIDTH", "End", "add_axes", "apart", "draw_lines", "name_lines", "number", "write_head"]

LEFT, WIDTH = 0.75, 8.0  # inches


class End(NamedTuple):
    """Where a line ends, and what is written there."""

    text: str
    x: float
    y: float
    colour: str


def add_axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Add axes at ``box``, (left, bottom, width, height) in inches, for lines over a logarithmic horizontal axis."""
    axes = add_panel(figure, *box)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xscale("log")
    return axes


def draw_lines(axes: Axes, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[End]:
    """Draw for each name the median of (values, quartiles) and a band between the quartiles; return the ends."""
    ends = []
    for style, (name, (values, (lower, median, upper))) in zip(STYLES, lines.items(), strict=False):
        axes.fill_between(values, lower, upper, color=style["color"], alpha=0.18, lw=0)
        axes.plot(values, median, lw=1.6, ms=4.5, mew=0, **style)
        ends.append(End(name, values[-1], median[-1], style["color"]))
    ticks = sorted({value for values, _ in lines.values() for value in values.tolist()})
    axes.set_xticks(ticks, [number(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, digits=6)))
    return ends


def name_lines(axes: Axes, ends: Sequence[End], against: str, base: float) -> None:
    """Draw a grey line at ``base``, and write the names of all lines into the right margin, none over another."""
    axes.axhline(base, color=GREY, lw=0.9, zorder=1)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # they stay when more is drawn
    ends = [*ends, End(against, axes.get_xlim()[1], base, GREY)]
    spots = axes.transAxes.inverted().transform(axes.transData.transform([(end.x, end.y) for end in ends]))
    line = 12.5 / 72 * axes.figure.dpi / axes.bbox.height  # points, in parts of the axis
    for end, (x, y), height in zip(ends, spots, apart(spots[:, 1].tolist(), line), strict=True):
        axes.plot([x, 1.0, 1.02], [y, y, height], color=end.colour, lw=0.7, transform=axes.transAxes, clip_on=False)
        axes.text(1.03, height, end.text, transform=axes.transAxes, va="center", size=9, color=end.colour)


def write_head(figure: Figure, heading: str, note: str) -> None:
    """Write the heading, and below it how to read the picture."""
    height = figure.get_size_inches()[1]
    figure.text(LEFT / WIDTH, 1 - 0.12 / height, heading, va="top", fontsize=13, weight="bold", color=INK)
    read = f"Lines: medians over the rounds. Bands: from quartile to quartile. {note}"
    figure.text(LEFT / WIDTH, 1 - 0.4 / height, read, va="top", fontsize=8.5, color=GREY)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Move places that are closer than ``gap`` just so far apart, those that touch around their common middle."""
    order = np.argsort(places, kind="stable")
    groups: list[list[float]] = []  # places that touch, each less gap times its rank: moved apart, these are equal
    for rank, index in enumerate(order):
        groups.append([places[index] - gap * rank])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    levels = [float(np.mean(group)) for group in groups for _ in group]
    moved = dict(zip(order.tolist(), (level + gap * rank for rank, level in enumerate(levels)), strict=True))
    return [moved[index] for index in range(len(places))]


def number(value: float, digits: int = 3) -> str:
    """Return a whole number as it is, any other with so many digits."""
    text = f"{value:,.0f}" if float(value).is_integer() else f"{float(f'{value:.{digits}g}'):,.10g}"
    return text.replace("-", "\N{MINUS SIGN}")
