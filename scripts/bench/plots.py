"""The pictures of docs/performance.md: what mixing costs as the batch, the network or the hidden state grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.lines import LEFT, WIDTH, add_axes, draw_lines, name_lines, number, write_head
from mm_lightning.diagnostics.drawing import GREY, INK, save_figure
from mm_lightning.study.spectra import STYLES

__all__ = ["Curve", "Picture", "curves", "draw", "draw_growth", "draw_interpolation"]

NAMES = {
    "batch": "batch size",
    "width": "width of the hidden layers",
    "classes": "number of classes",
    "layers": "number of hidden layers",
}
WAYS = ("mix", "textbook")  # sides of `interpolation` that are drawn


class Picture(NamedTuple):
    """A file in ``docs`` and what a reader who does not see it needs to know."""

    file: str
    alt: str


class Curve(NamedTuple):
    """One side of several rows. The first axis of ``ratio`` and ``extra`` is lower quartile, median, upper quartile.

    ``values`` is what grows, ascending, (V,); ``ratio`` the time over that of the side compared with, (3, V); ``extra``
    the time beyond it in milliseconds, (3, V).
    """

    values: np.ndarray
    ratio: np.ndarray
    extra: np.ndarray


def draw(results: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, list[Picture]]:
    """Draw what there are numbers for.

    Args:
        results: The numbers by name of the benchmark; ``scaling`` and ``interpolation`` are looked at.
        folder: Where the pictures are put, as ``performance_*.png``.

    Returns:
        The pictures by name of the benchmark.
    """
    pictures: dict[str, list[Picture]] = {}
    rows = results.get("scaling", {}).get("rows", [])
    for vary in dict.fromkeys(row["vary"] for row in rows):
        own = [row for row in rows if row["vary"] == vary]
        found, against = curves(own, "value"), own[0]["against"]
        picture = Picture(
            f"performance_scaling_{vary}.png",
            f"Time of a training step as a ratio to {against}, by {NAMES.get(vary, vary)}: {_in_words(found)}",
        )
        save_figure(draw_growth(found, vary, against), folder / picture.file)
        pictures.setdefault("scaling", []).append(picture)
    panels = interpolation_panels(results.get("interpolation", {}).get("rows", []))
    if panels:
        words = "; ".join(f"{dtype}: {_in_words(found, ' MB')}" for dtype, (found, _) in panels.items())
        picture = Picture("performance_interpolation.png", f"Time of mixing as a ratio to copies, by size. {words}")
        save_figure(draw_interpolation(panels), folder / picture.file)
        pictures["interpolation"] = [picture]
    return pictures


def curves(rows: Sequence[Mapping[str, Any]], key: str, unit: float = 1.0) -> dict[str, Curve]:
    """Collect rows into a curve for each side but the one compared with.

    Args:
        rows: Rows as of :func:`bench.timing.compare`.
        key: The fact that grows from row to row.
        unit: What its values are divided by.

    Returns:
        The curves by side; a side need not be in every row.
    """
    found = {}
    rows = sorted(rows, key=lambda row: row[key])
    for side in dict.fromkeys(side for row in rows for side in row["ratios"]):
        own = [row for row in rows if side in row["ratios"]]
        ratios = [[row["ratios"][side][name] for name in ("lower_quartile", "median", "upper_quartile")] for row in own]
        differences = [np.subtract(row["seconds"][side], row["seconds"][row["against"]]) for row in own]
        extra = [1e3 * np.quantile(seconds, (0.25, 0.5, 0.75)) for seconds in differences]
        found[side] = Curve(np.array([row[key] / unit for row in own]), np.array(ratios).T, np.array(extra).T)
    return found


def interpolation_panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[dict[str, Curve], dict[str, Curve]]]:
    """Collect the rows of ``interpolation`` that are drawn: forward and backward, one ``lam`` a batch, over megabytes.

    Returns:
        By dtype the curves of contiguous hidden states, and of channels-last ones.
    """
    panels = {}
    drawn = [row for row in rows if row["against"] == "copies" and {*WAYS} <= row["ratios"].keys()]
    drawn = [row for row in drawn if not row["per_sample"]]
    for dtype in dict.fromkeys(row["dtype"] for row in drawn):
        layouts = []
        for layout in ("contiguous", "channels-last"):
            own = [row for row in drawn if (row["dtype"], row["layout"]) == (dtype, layout)]
            found = curves(own, "bytes", 1e6)
            layouts.append({side: found[side] for side in WAYS if side in found})
        panels[dtype] = (layouts[0], layouts[1])
    return panels


def draw_growth(found: Mapping[str, Curve], vary: str, against: str) -> Figure:
    """Draw the ratios of a step's time above, and below them the milliseconds that they are; both over what grows.

    Args:
        found: A curve for each side.
        vary: What grows.
        against: The side compared with, a grey line.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    high, between, bottom, top = 1.75, 0.22, 0.55, 0.72  # inches
    right = 0.3 + 0.072 * (max(map(len, found)) + 10)  # the lines' names and last numbers, 9 points high
    figure = Figure(figsize=(WIDTH, top + 2 * high + between + bottom), dpi=120, facecolor="white")
    heading = f"Cost of mixup in a training step, by {NAMES.get(vary, vary)}"
    write_head(figure, heading, "Lower axis: linear up to ±0.1 ms.")
    ratios = add_axes(figure, (LEFT, bottom + high + between, WIDTH - LEFT - right, high))
    ends = draw_lines(ratios, {side: (curve.values, curve.ratio) for side, curve in found.items()})
    name_lines(ratios, [end._replace(text=f"{end.text}  {end.y:.2f}") for end in ends], against, 1.0)
    ratios.set_ylabel(f"ratio to {against}")
    ratios.tick_params(labelbottom=False)
    extra = add_axes(figure, (LEFT, bottom, WIDTH - LEFT - right, high))
    extra.set_yscale("symlog", linthresh=0.1, linscale=0.5)  # from microseconds to seconds, and noise below zero
    ends = draw_lines(extra, {side: (curve.values, curve.extra) for side, curve in found.items()})
    name_lines(extra, [end._replace(text=f"{end.text}  {number(end.y, 2)} ms") for end in ends], against, 0.0)
    extra.set(ylabel="extra milliseconds", xlabel=NAMES.get(vary, vary))
    return figure


def draw_interpolation(panels: Mapping[str, tuple[Mapping[str, Curve], Mapping[str, Curve]]]) -> Figure:
    """Draw the time of mixing as a ratio to copies over the size of the hidden state, a panel for each dtype.

    Args:
        panels: As of :func:`interpolation_panels`. Lines are contiguous, hollow markers channels-last.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    high, between, bottom, top, right = 2.9, 0.25, 0.55, 0.98, 1.35  # inches
    figure = Figure(figsize=(WIDTH, top + high + bottom), dpi=120, facecolor="white")
    write_head(figure, "Mixing a hidden state, forward and backward", "Hollow markers: channels-last.")
    wide = (WIDTH - LEFT - right + between) / len(panels) - between
    drawn = []
    for column, (dtype, (contiguous, channels_last)) in enumerate(panels.items()):
        axes = add_axes(figure, (LEFT + column * (wide + between), bottom, wide, high))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        for style, side in zip(STYLES, channels_last.values(), strict=False):
            axes.plot(side.values, side.ratio[1], **{**style, "ls": ""}, mfc="none", ms=8, mew=1.3, zorder=3)
        ends = draw_lines(axes, {side: (curve.values, curve.ratio) for side, curve in contiguous.items()})
        axes.set_title(dtype, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("megabytes of the hidden state")
        axes.tick_params(labelleft=column == 0)
        drawn.append((axes, ends))
    limits = [axes.get_ylim() for axes, _ in drawn]
    for axes, _ in drawn:
        axes.set_ylim(min(0.9, *(start for start, _ in limits)), max(end for _, end in limits))
        axes.axhline(1.0, color=GREY, lw=0.9, zorder=1)
    drawn[0][0].set_ylabel("ratio to three copies")
    name_lines(*drawn[-1], "three copies", 1.0)
    return figure


def _in_words(found: Mapping[str, Curve], unit: str = "") -> str:
    """The medians at both ends of each curve."""
    texts = []
    for side, curve in found.items():
        ends = {number(curve.values[end]): number(curve.ratio[1, end]) for end in (0, -1)}
        texts.append(f"{side} {' and '.join(f'{ratio} at {value}{unit}' for value, ratio in ends.items())}")
    return "; ".join(texts)
