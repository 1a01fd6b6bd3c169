"""Singular values of several methods beside each other: class by class, and summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mm_lightning.diagnostics.drawing import (
    INK,
    PALETTE,
    ClassNames,
    add_legend,
    add_panel,
    label_outer,
    titled_figure,
    write_titles,
)
from mm_lightning.diagnostics.spectrum import WIDE, set_spectrum_axes
from mm_lightning.evaluation.spectrum import spectrum_numbers

STYLES: tuple[dict[str, Any], ...] = (  # a line differs from the others in colour, in dashes and in its marker
    {"color": PALETTE[0], "ls": "-", "marker": "o"},
    {"color": PALETTE[3], "ls": (0, (5, 1.5)), "marker": "s"},
    {"color": PALETTE[2], "ls": (0, (1.5, 1)), "marker": "^"},
    {"color": PALETTE[1], "ls": (0, (5, 1.5, 1.2, 1.5)), "marker": "D"},
    {"color": PALETTE[7], "ls": "-", "marker": "v"},
    {"color": PALETTE[8], "ls": (0, (5, 1.5)), "marker": "P"},
    {"color": PALETTE[9], "ls": (0, (1.5, 1)), "marker": "X"},
)


def draw_spectra_by_class(
    spectra: Mapping[str, np.ndarray],
    classes: Sequence[int],
    heading: str = "Singular values by class",
    class_names: ClassNames | None = None,
) -> Figure:
    """Draw a panel per class, five in a row, with the singular values of every method against their rank.

    This is the comparison of Verma et al. (2019, appendix on the flattening of representations). How to read it: the
    steeper a line falls, the fewer directions the class takes up. A line is the mean over the seeds, the band around it
    reaches from the smallest to the largest of them. All panels share their axes; values below 1e-4 of the largest are
    not drawn.

    Args:
        spectra: Singular values by title of the method, (K, D) or, for S seeds, (S, K, D); K and D are the same for
            all.
        classes: Class indices, (K,).
        heading: Heading of the figure.
        class_names: Text for each class, by class index; default is ``class`` and the index.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.

    Raises:
        ValueError: If shapes do not fit or there are more than seven methods.
    """
    stacks = _stacked(spectra, len(classes))
    columns = min(5, len(classes))
    rows = -(-len(classes) // columns)
    side, gap, left, bottom, between = 1.62, 0.2, 0.75, 0.55, 0.34  # inches
    top = 0.85 + 0.2 * (_legend_rows(stacks) - 1)
    width = max(left + columns * (side + gap) - gap + 0.12, 4.5)
    figure = titled_figure(width, top + rows * (side + between) - between + bottom, heading, left)
    for place, k in enumerate(classes):
        row, column = divmod(place, columns)
        corner = left + column * (side + gap), bottom + (rows - 1 - row) * (side + between)
        axes = add_panel(figure, *corner, side, side)
        set_spectrum_axes(axes, np.concatenate([stack.reshape(-1, stack.shape[-1]) for stack in stacks.values()]))
        _draw_lines(axes, {title: stack[:, place] for title, stack in stacks.items()})
        axes.set_title(f"class {k}" if class_names is None else class_names[k], loc="left", fontsize=10, color=INK)
        label_outer(axes, is_left=column == 0, is_lowest=place + columns >= len(classes))
    _add_legend(figure, left)
    return figure


def draw_spectrum_summaries(
    spectra: Mapping[str, Mapping[str, np.ndarray]], heading: str = "Singular values"
) -> Figure:
    """Draw the mean over the classes, the largest singular value and the sum of all others; a row per layer.

    How to read it: on the left a line is a method's mean over classes and seeds, and its band reaches from the smallest
    to the largest seed. On the right a bar is the mean over the seeds of ``largest`` or ``others`` as of
    :func:`spectrum_numbers`, and each dot one seed. A flat representation has a long upper and a short lower bar.

    Args:
        spectra: Singular values by title of the layer and title of the method, (K, D) or, for S seeds, (S, K, D); of
            the same methods in each layer.
        heading: Heading of the figure.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.

    Raises:
        ValueError: If shapes do not fit or there are more than seven methods.
    """
    stacks = {layer: _stacked(methods) for layer, methods in spectra.items()}
    titles = list(next(iter(stacks.values())))
    left, lines, bars, bottom, between = 0.75, 3.9, 2.6, 0.55, 0.75  # inches
    names = 0.3 + 0.075 * max(map(len, titles))
    high = max(3.0, 2 * (0.24 * len(titles) + 0.35) + 0.4)
    top = 0.95 + 0.2 * (_legend_rows(dict.fromkeys(titles)) - 1)
    height = top + len(stacks) * (high + between) - between + bottom
    figure = titled_figure(left + lines + names + bars + 0.6, height, heading, left)
    half = (high - 0.7) / 2
    for row, (layer, methods) in enumerate(stacks.items()):
        foot = bottom + (len(stacks) - 1 - row) * (high + between)
        axes = add_panel(figure, left, foot, lines, high)
        means = {title: stack.mean(axis=1) for title, stack in methods.items()}
        set_spectrum_axes(axes, np.concatenate(list(means.values())))
        _draw_lines(axes, means)
        write_titles(axes, f"{layer}, mean over the classes")
        numbers = {
            title: [spectrum_numbers(torch.from_numpy(seed)) for seed in stack] for title, stack in methods.items()
        }
        for key, title, above in (("largest", "largest", half + 0.7), ("others", "sum of all others", 0.0)):
            axes = add_panel(figure, left + lines + names, foot + above, bars, half)
            _draw_bars(axes, {name: [seed[key] for seed in seeds] for name, seeds in numbers.items()})
            write_titles(axes, f"{layer}, {title}")
    _add_legend(figure, left)
    return figure


def _stacked(spectra: Mapping[str, np.ndarray], num_classes: int | None = None) -> dict[str, np.ndarray]:
    if not 1 <= len(spectra) <= len(STYLES):
        raise ValueError(f"spectra must be of 1 to {len(STYLES)} methods, got {len(spectra)}.")
    shapes = {title: np.shape(values) for title, values in spectra.items()}
    if len({shape[-2:] for shape in shapes.values()}) > 1 or not all(len(shape) in (2, 3) for shape in shapes.values()):
        raise ValueError(f"spectra must be (K, D) or (S, K, D) with the same K and D, got {shapes}.")
    stacks = {
        title: np.array(values, dtype=float).reshape(-1, *shapes[title][-2:]) for title, values in spectra.items()
    }
    if num_classes not in (None, next(iter(stacks.values())).shape[1]):
        raise ValueError(f"spectra must have a row for each of the {num_classes} classes, got {shapes}.")
    return stacks


def _draw_lines(axes: Axes, spectra: Mapping[str, np.ndarray]) -> None:
    floor = axes.get_ylim()[0]
    for place, (title, values) in enumerate(spectra.items()):  # (S, D)
        ranks, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
        # eight markers a line, at other places than those of the lines beside it
        spots = np.geomspace(1, len(ranks), 8) * (1 + 0.03 * place) if len(ranks) > WIDE else ranks
        marked = np.unique(spots.round().astype(int).clip(max=len(ranks))) - 1
        style: dict[str, Any] = {"lw": 1.4, "ms": 3.6, "mew": 0, **STYLES[place]}
        axes.plot(ranks, np.where(mean > floor, mean, np.nan), markevery=marked.tolist(), label=title, **style)
        if len(values) > 1:
            low, high = (np.maximum(ends, floor) for ends in (values.min(axis=0), values.max(axis=0)))
            axes.fill_between(ranks, low, high, where=high > floor, color=style["color"], alpha=0.18, lw=0)


def _draw_bars(axes: Axes, numbers: Mapping[str, Sequence[float]]) -> None:
    most = max(max(seeds) for seeds in numbers.values())
    for place, seeds in enumerate(numbers.values()):
        style = STYLES[place]
        axes.barh(place, np.mean(seeds), height=0.62, color=style["color"], alpha=0.35)
        dots: dict[str, Any] = {
            "color": style["color"],
            "marker": style["marker"],
            "ms": 5.5,
            "mec": "white",
            "mew": 0.6,
        }
        axes.plot(seeds, [place] * len(seeds), ls="", **dots)
        text = f"{np.mean(seeds):,.0f}" if most >= 1000 else f"{np.mean(seeds):.4g}"
        axes.text(max(seeds) + 0.04 * most, place, text, va="center", size=8.5, color=INK)
    axes.set(yticks=range(len(numbers)), yticklabels=list(numbers), ylim=(len(numbers) - 0.45, -0.55))
    axes.set_xlim(0, 1.25 * most)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _legend_rows(methods: Mapping[str, Any]) -> int:
    return 1 if len(methods) <= 4 else 2


def _add_legend(figure: Figure, left: float) -> None:
    add_legend(figure, figure.axes[0], left, 0.37, ncols=4, fontsize=9, handlelength=3)
