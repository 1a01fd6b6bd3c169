"""Singular values of several methods in several layers, summed up in one picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure

from mm_lightning.diagnostics.figures import INK
from mm_lightning.diagnostics.spectra_of_methods import (
    _add_axes,
    _draw_bars,
    _draw_lines,
    _head,
    _legend_rows,
    _stacked,
)
from mm_lightning.diagnostics.spectrum import dress_spectrum, spectrum_numbers


def draw_spectrum_summaries(
    spectra: Mapping[str, Mapping[str, np.ndarray]], heading: str = "Singular values"
) -> Figure:
    """Draw what :func:`draw_spectrum_summary` shows of one layer for several, one below the other.

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
    figure = Figure(figsize=(left + lines + names + bars + 0.6, height), dpi=120, facecolor="white")
    half = (high - 0.7) / 2
    for row, (layer, methods) in enumerate(stacks.items()):
        foot = bottom + (len(stacks) - 1 - row) * (high + between)
        axes = _add_axes(figure, left, foot, lines, high)
        means = {title: stack.mean(axis=1) for title, stack in methods.items()}
        dress_spectrum(axes, np.concatenate(list(means.values())))
        _draw_lines(axes, means)
        axes.set_ylabel("singular value")
        axes.set_title(f"{layer}, mean over the classes", loc="left", fontsize=11, color=INK)
        numbers = {
            title: [spectrum_numbers(torch.from_numpy(seed)) for seed in stack] for title, stack in methods.items()
        }
        for key, title, above in (("largest", "largest", half + 0.7), ("others", "sum of all others", 0.0)):
            axes = _add_axes(figure, left + lines + names, foot + above, bars, half)
            _draw_bars(axes, {name: [seed[key] for seed in seeds] for name, seeds in numbers.items()})
            axes.set_title(f"{layer}, {title}", loc="left", fontsize=11, color=INK)
    _head(figure, heading, left)
    return figure
