"""What all pictures share: colours, frame, and the one place that hands a figure to loggers and to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mm_lightning.files import whole_file

ClassNames = Mapping[int, str] | Sequence[str]

FILE_DPI = 200  # dots per inch: 8 inches give 1600 pixels, sharp on a high-resolution screen
INK, GREY, HAIRLINE = "#1f2328", "#59636e", "#c8cfd7"
# Okabe and Ito's hues, moved apart in OKLab until any two differ by 0.17, and by 0.12 as protanopes and deuteranopes
# see them (Machado et al. 2009); matplotlib's petroff10 reaches 0.09 and 0.06.
PALETTE = (
    *("#0066dd", "#d39100", "#168266", "#d73400", "#fd9dab"),
    *("#4cd4ff", "#b2da1d", "#7a1d33", "#2f367f", "#9188c1"),
)


def log_figure(trainer: Trainer, tag: str, figure: Figure, step: int | None = None) -> None:
    """Send a figure to every logger that takes images; without such a logger nothing happens.

    TensorBoard gets it by ``add_figure``, any other logger (Weights & Biases, ...) by ``log_image`` as RGB array.

    Args:
        trainer: Its ``loggers`` are served.
        tag: Name of the picture, ``group/quantity``.
        figure: The picture.
        step: Position on the loggers' time axis, in optimizer steps; default ``trainer.global_step``.
    """
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # nothing to close: the figure was not made by pyplot
            logger.experiment.add_figure(tag, figure, global_step=step, close=False)
        elif callable(log_image := getattr(logger, "log_image", None)):
            log_image(key=tag, images=[_pixels(figure)], step=step)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file, whole or not at all; an older file of that name survives a failure.

    Args:
        figure: The picture.
        path: Target; its suffix gives the format (``.png``, ``.pdf``, ``.svg``). Missing folders are made.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=FILE_DPI)
    return path


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays to a compressed ``.npz`` file, whole or not at all."""
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # any name might be allow_pickle


def draw_clouds(
    plane: Tensor,
    targets: Tensor,
    subsets: Sequence[Sequence[int]],
    numbers: Sequence[Mapping[str, str]],
    axis_names: Sequence[str],
    title: str,
    class_names: ClassNames | None = None,
) -> Figure:
    """Draw a coloured, labelled cloud of points per class, a panel per subset of classes, all on one square frame.

    Args:
        plane: Points, finite, (N, 2).
        targets: Class indices, integer, (N,); they choose the colour.
        subsets: The classes of each panel, from left to right.
        numbers: What is written below each panel, by name.
        axis_names: Of the horizontal and the vertical axis.
        title: Heading of the figure.
        class_names: Text of each class's box, by class index; default is the index.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.

    Raises:
        ValueError: If no class of the subsets is among the targets.
    """
    members = [torch.isin(targets, torch.tensor(list(subset))) for subset in subsets]
    shown = torch.stack(members).any(dim=0)
    if not shown.any():
        raise ValueError(f"subsets {[list(subset) for subset in subsets]} hold none of {targets.unique().tolist()}.")
    low, high = square_frame(plane[shown])
    xlim, ylim = zip(low.tolist(), high.tolist(), strict=True)
    side, gap, left, right, bottom, height = 3.5, 0.25, 0.65, 0.1, 1.1, 5.35  # inches
    width = left + len(subsets) * (side + gap) - gap + right
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    points = min(13.0, 72 * (width - left - right) / (0.68 * len(title) + 1))  # a bold letter is about 0.68 em wide
    figure.text(left / width, 0.972, title, va="top", fontsize=points, weight="bold", color=INK)
    for column, (subset, member) in enumerate(zip(subsets, members, strict=True)):
        corner = (left + column * (side + gap)) / width, bottom / height
        axes = figure.add_axes((*corner, side / width, side / height), facecolor="white")
        axes.set(xlim=xlim, ylim=ylim, aspect="equal", xlabel=axis_names[0])
        _dress(axes)
        if member.any():
            _draw_classes(axes, plane[member], targets[member], class_names)
        outside = int(((plane < low) | (plane > high)).any(dim=1)[member].sum())
        note = f"{int(member.sum()):,} points" + (f", {outside:,} outside the frame" if outside else "")
        axes.set_title(_span(subset), loc="left", fontsize=11, color=INK)
        axes.set_title(note, loc="right", fontsize=8.5, color=GREY)
        axes.set_ylabel(axis_names[1] if column == 0 else "")
        axes.tick_params(labelleft=column == 0)
        for place, (name, number) in enumerate(numbers[column].items()):
            x = (place + 0.5) / len(numbers[column])
            axes.text(x, -0.215, number, transform=axes.transAxes, ha="center", size=13, weight="bold", color=INK)
            axes.text(x, -0.268, name, transform=axes.transAxes, ha="center", size=8.5, color=GREY)
    return figure


def square_frame(plane: Tensor, tail: float = 0.005, margin: float = 0.12) -> tuple[Tensor, Tensor]:
    """Axis limits that a few far points cannot stretch.

    Args:
        plane: Points, finite, (N, 2).
        tail: Fraction of the points that may be cut off at each end of each axis.
        margin: Room beyond these quantiles, as a fraction of their distance, used only as far as points reach.

    Returns:
        Lower and upper corner, each (2,), of a square.
    """
    ends = torch.quantile(plane, torch.tensor([tail, 1 - tail], dtype=plane.dtype), dim=0)
    room = margin * (ends[1] - ends[0])
    low = torch.maximum(ends[0] - room, plane.amin(dim=0))
    high = torch.minimum(ends[1] + room, plane.amax(dim=0))
    # 8 % more on either side: room for the label of a cloud at the edge; a single place gets a frame of side 1
    half = 0.58 * (high - low).max()
    half = half if half > 0 else torch.full_like(half, 0.5)
    return (low + high) / 2 - half, (low + high) / 2 + half


def spread_apart(places: Tensor, gap: float, low: Tensor, high: Tensor) -> Tensor:
    """Move places that are closer than ``gap`` just so far apart, as labels need, and keep them in the frame.

    Args:
        places: Wanted places, (K, 2).
        gap: Smallest distance.
        low: Lower corner of the frame, (2,).
        high: Upper corner, (2,).

    Returns:
        Places near the wanted ones, (K, 2).
    """
    # equal places have no direction to part in: give each a tiny one of its own
    angle = 2 * torch.pi * torch.arange(len(places)) / max(len(places), 1)
    places = places + 1e-3 * gap * torch.stack([angle.cos(), angle.sin()], dim=1)
    for _ in range(200):
        offset = places[:, None] - places[None]  # (K, K, 2)
        distance = offset.norm(dim=2, keepdim=True).clamp_min(1e-9 * gap)
        push = (gap - distance).clamp_min(0) / 2 * offset / distance  # zero on the diagonal
        places = (places + push.sum(dim=1)).clamp(low + gap / 2, high - gap / 2)
    return places


def _draw_classes(axes: Axes, plane: Tensor, targets: Tensor, names: ClassNames | None) -> None:
    # a shuffle, the same each time: in data sorted by class the last one would cover the others
    order = torch.randperm(len(plane), generator=torch.Generator().manual_seed(0))
    x, y = plane[order].T.numpy()
    colours = [PALETTE[k % len(PALETTE)] for k in targets[order].tolist()]
    size = max(4.5, min(30.0, 30_000 / len(plane)))  # points squared
    # as pixels: thousands of points would make a vector file huge
    axes.scatter(x, y, s=size, c=colours, alpha=0.4, linewidths=0, rasterized=True)
    low, high = (torch.tensor(ends, dtype=plane.dtype) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
    classes = targets.unique().tolist()
    for k, (x, y) in zip(classes, _label_places(plane, targets, low, high).tolist(), strict=True):
        box = {"boxstyle": "round,pad=0.22", "fc": "white", "ec": PALETTE[k % len(PALETTE)], "lw": 1.6, "alpha": 0.93}
        text = str(k) if names is None else names[k]
        axes.text(x, y, text, ha="center", va="center", size=10.5, weight="bold", color=INK, bbox=box)


def _label_places(plane: Tensor, targets: Tensor, low: Tensor, high: Tensor) -> Tensor:
    side = (high - low)[0]
    places = []
    for k in targets.unique():
        own = plane[targets == k]
        median = own.median(dim=0).values
        radius = (own - median).norm(dim=1).quantile(0.75) / side
        # a box would hide a cloud of its own size: step beside it, away from the middle
        step = 0.075 * side * ((0.08 - radius) / 0.04).clamp(0, 1)
        places.append(median + step * torch.nn.functional.normalize(median - (low + high) / 2, dim=0))
    return spread_apart(torch.stack(places), 0.078 * float(side), low, high)


def _span(classes: Sequence[int]) -> str:
    first, last = min(classes), max(classes)
    is_run = sorted(classes) == list(range(first, last + 1))
    return f"Classes {first}–{last}" if is_run else "Classes " + ", ".join(map(str, classes))


def _dress(axes: Axes) -> None:
    axes.spines[:].set(color=HAIRLINE, linewidth=0.8)
    axes.tick_params(length=2.5, width=0.8, color=HAIRLINE, labelsize=8.5, labelcolor=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # (H, W, 3), uint8
