"""A picture of what the mixing did in an epoch: the ratios and layers drawn, and the loss at each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mm_lightning.callback import UNMIXED
from mm_lightning.diagnostics.drawing import GREY, HAIRLINE, INK, add_panel, class_colour, titled_figure, write_titles


class Mixing(NamedTuple):
    """How the batches of one epoch were mixed, on one process. The layers are in the order of the picture's rows."""

    alpha: float  # lam ~ Beta(alpha, alpha); nan if it is not
    lam: np.ndarray  # of the mixed batches, or of their rows where drawn per sample, in [0, 1], (M,)
    counts: dict[str, int]  # batches by layer
    expected: dict[str, float]  # share of the batches by layer, in [0, 1]
    losses: dict[str, np.ndarray]  # of the batches that gave one, by layer, (n,)


def expected_shares(layers: Sequence[str], probability: float, weights: Sequence[float] | None) -> dict[str, float]:
    """Return the probability that a batch is mixed at each layer, and under ``"unmixed"`` that it is not mixed.

    Args:
        layers: Names of the eligible layers.
        probability: Share of the batches that is mixed, in [0, 1].
        weights: Probability of each layer up to a factor; None for equal ones.
    """
    weights = [1.0] * len(layers) if weights is None else weights
    shares = {layer: probability * weight / sum(weights) for layer, weight in zip(layers, weights, strict=True)}
    return {**shares, UNMIXED: 1 - sum(shares.values())}


def draw_mixing(mixing: Mixing, num_bins: int = 20, title: str = "Mixing of one epoch") -> Figure:
    """Draw which ratios and layers an epoch drew, and the loss at each layer.

    How to read it: on the left the histogram of ``lam`` should follow the line, the density of Beta(alpha, alpha). In
    the middle the bars, the share of the batches mixed at each layer, should end within the grey bands, two standard
    errors around the expected shares, which are drawn as black strokes; of twenty bars about one does not. On the right
    each small dot is the loss of one batch; the large dots are the means, their bars one standard deviation. The loss
    is of the mixed targets, so it depends on the layer even for an ideal network, and falls while the epoch lasts.

    Args:
        mixing: What was drawn. Layers that were neither drawn nor expected get no row.
        num_bins: Bins of the histogram, of equal width between 0 and 1.
        title: Heading of the figure.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    rows = [layer for layer in mixing.expected if mixing.counts[layer] or mixing.expected[layer]]
    colours = {layer: class_colour(i) for i, layer in enumerate(mixing.expected)} | {UNMIXED: GREY}
    names = [_shortened(layer) for layer in rows]
    left, width, gap, label, bottom, top = 0.6, 2.2, 0.3, 0.45 + 0.065 * max(map(len, names)), 0.6, 0.72  # inches
    high = max(1.9, 0.34 * len(rows))
    figure = titled_figure(left + 3 * width + label + gap + 0.15, bottom + high + top, title, left)
    places = left, left + width + label, left + 2 * width + label + gap
    ratios, shares, losses = (add_panel(figure, place, bottom, width, high) for place in places)
    _draw_ratios(ratios, mixing, num_bins)
    _draw_shares(shares, mixing, rows, colours)
    _draw_losses(losses, mixing, rows, colours)
    middle, half = (len(rows) - 1) / 2, max(len(rows), 3) / 2  # of one or two rows the bars would be high
    for axes in (shares, losses):
        axes.set(ylim=(middle + half, middle - half), yticks=range(len(rows)))
        axes.tick_params(axis="y", length=0)
    shares.set_yticklabels(names, size=10, color=INK)
    losses.set_yticklabels([])
    return figure


def _shortened(layer: str) -> str:
    end = layer[-19:]
    return layer if len(layer) <= 20 else f"…{end.partition('.')[2] or end}"


def _draw_ratios(axes: Axes, mixing: Mixing, num_bins: int) -> None:
    axes.set(xlim=(0, 1), xlabel="lam", ylabel="density")
    write_titles(axes, "Ratio", f"{mixing.lam.size:,} draws" if mixing.lam.size else "")
    if not mixing.lam.size:
        axes.text(0.5, 0.5, "nothing was mixed", transform=axes.transAxes, ha="center", color=GREY, size=10)
        axes.set_yticks([])
        return
    heights, *_ = axes.hist(
        mixing.lam, bins=num_bins, range=(0, 1), density=True, color=GREY, alpha=0.4, edgecolor="white", lw=0.5
    )
    if math.isnan(mixing.alpha):
        return
    x = torch.linspace(0, 1, 401)[1:-1]  # below alpha = 1 the density has no end at 0 and 1
    density = torch.distributions.Beta(mixing.alpha, mixing.alpha).log_prob(x).exp().numpy()
    axes.plot(x, density, color=INK, lw=1.6, label=f"Beta({mixing.alpha:g}, {mixing.alpha:g})")
    within = density[(x > 0.5 / num_bins) & (x < 1 - 0.5 / num_bins)]
    axes.set_ylim(0, 1.25 * max(*heights, *within))
    axes.legend(loc="upper center", frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.4)


def _draw_shares(axes: Axes, mixing: Mixing, rows: Sequence[str], colours: Mapping[str, str]) -> None:
    total = sum(mixing.counts.values())
    on_any_colour = [withStroke(linewidth=2.8, foreground="white")]
    for row, layer in enumerate(rows):
        share, expected = mixing.counts[layer] / total, mixing.expected[layer]
        error = (expected * (1 - expected) / total) ** 0.5
        axes.barh(row, 400 * error, left=100 * (expected - 2 * error), height=0.78, color=HAIRLINE, alpha=0.7)
        axes.barh(row, 100 * share, height=0.4, color=colours[layer])
        axes.vlines(100 * expected, row - 0.39, row + 0.39, color=INK, lw=1.6, path_effects=on_any_colour, zorder=3)
    axes.set(xlim=(0, 1.08 * axes.dataLim.x1), xlabel=f"% of {total:,} batches")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    write_titles(axes, "Layer", "expected ± 2 SE")


def _draw_losses(axes: Axes, mixing: Mixing, rows: Sequence[str], colours: Mapping[str, str]) -> None:
    rng = np.random.default_rng(0)  # spreads the dots within their row, the same way each time
    for row, layer in enumerate(rows):
        loss = mixing.losses[layer]
        loss = loss[np.isfinite(loss)]
        if not loss.size:
            continue
        heights = row + rng.uniform(-0.28, 0.28, loss.size)
        size = max(5.0, min(16.0, 1000 / loss.size))  # points squared
        axes.scatter(loss, heights, s=size, color=colours[layer], alpha=0.4, linewidths=0, rasterized=True)
        axes.errorbar(loss.mean(), row, xerr=loss.std(), color=INK, lw=1.8, marker="o", ms=7, mec="white", mew=1.2)
    axes.set_xlabel("loss of the batch")
    write_titles(axes, "Loss", "mean ± SD")
    if not any(loss.size for loss in mixing.losses.values()):
        axes.text(0.5, 0.5, "training_step gave none", transform=axes.transAxes, ha="center", color=GREY, size=10)
        axes.set_xticks([])
