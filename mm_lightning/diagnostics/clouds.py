"""Clouds of points by class: their frame, their dots, and the names of the classes, none over another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from mm_lightning.diagnostics.drawing import INK, ClassNames, class_colour, class_name


def draw_clouds(axes: Axes, points: Tensor, targets: Tensor, names: ClassNames | None = None) -> None:
    """Draw points in the colours of their classes, and each class's name in a box at the median of its points.

    Where a box would hide its cloud it stands beside it, and boxes that would overlap are moved apart.

    Args:
        axes: Where to draw; their limits are set already, and the same on both axes.
        points: Finite, (N, 2).
        targets: Class indices, integer, (N,).
        names: Text for the classes, by class index; default is the index.
    """
    # a shuffle, the same each time: in data sorted by class the last one would cover the others
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    x, y = points[order].T.numpy()
    colours = [class_colour(k) for k in targets[order].tolist()]
    size = max(4.5, min(30.0, 30_000 / len(points)))  # points squared
    # as pixels: thousands of points would make a vector file huge
    axes.scatter(x, y, s=size, c=colours, alpha=0.4, linewidths=0, rasterized=True)
    low, high = (torch.tensor(ends, dtype=points.dtype) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
    label_classes(axes, targets.unique().tolist(), _places_beside(points, targets, low, high), low, high, names)


def label_classes(
    axes: Axes,
    classes: Sequence[int],
    places: Tensor,
    low: Tensor,
    high: Tensor,
    names: ClassNames | None,
    size: float = 10.5,
    pad: float = 0.22,
) -> None:
    """Write the names of classes in boxes near their places, so far apart that none covers another.

    Args:
        axes: Where to write.
        classes: K class indices.
        places: Wanted places, (K, 2).
        low: Lower corner of the frame, (2,).
        high: Upper corner, (2,).
        names: Text for the classes, by class index; default is the index.
        size: Of the letters, in points.
        pad: Room in the box around them, as a fraction of their size.
    """
    places = spread_apart(places, 0.078 * float((high - low).max()), low, high)
    for k, (x, y) in zip(classes, places.tolist(), strict=True):
        box = {"boxstyle": f"round,pad={pad}", "fc": "white", "ec": class_colour(k), "lw": 1.6, "alpha": 0.93}
        text = class_name(k, names)
        axes.text(x, y, text, ha="center", va="center", size=size, weight="bold", color=INK, bbox=box)


def classes_in_words(classes: Sequence[int]) -> str:
    """Return the title of a panel of these classes: ``"Classes 0–4"``, or each of them where they are no run."""
    first, last = min(classes), max(classes)
    is_run = sorted(classes) == list(range(first, last + 1))
    return f"Classes {first}–{last}" if is_run else "Classes " + ", ".join(map(str, classes))


def half_and_all(classes: Sequence[int]) -> list[Sequence[int]]:
    """Return the panels that classes are shown in by default: the lower half of them, and all; few are not halved."""
    half = classes[: (len(classes) + 1) // 2]
    return [half, classes] if len(half) > 1 else [classes]


def square_frame(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Axis limits that a few far points cannot stretch.

    Args:
        plane: Points, finite, (N, 2).

    Returns:
        Lower and upper corner, each (2,), of a square.
    """
    # half a percent of the points at each end may be cut off; room beyond is used only as far as points reach
    ends = torch.quantile(plane, torch.tensor([0.005, 0.995], dtype=plane.dtype), dim=0)
    room = 0.12 * (ends[1] - ends[0])
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


def _places_beside(points: Tensor, targets: Tensor, low: Tensor, high: Tensor) -> Tensor:
    side = (high - low)[0]
    places = []
    for k in targets.unique():
        own = points[targets == k]
        median = own.median(dim=0).values
        radius = (own - median).norm(dim=1).quantile(0.75) / side
        # a box would hide a cloud of its own size: step beside it, away from the middle
        step = 0.075 * side * ((0.08 - radius) / 0.04).clamp(0, 1)
        places.append(median + step * torch.nn.functional.normalize(median - (low + high) / 2, dim=0))
    return torch.stack(places)
