"""Hidden planes of several methods beside each other: clouds of points by class, and the classes predicted there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mm_lightning.diagnostics.clouds import classes_in_words, draw_clouds, square_frame
from mm_lightning.diagnostics.confidence_figure import P_CLASS1, class_colours, draw_confidence_map
from mm_lightning.diagnostics.drawing import (
    GREY,
    HAIRLINE,
    INK,
    ClassNames,
    add_panel,
    class_name,
    label_outer,
    titled_figure,
)
from mm_lightning.diagnostics.hidden_space import class_separation
from mm_lightning.diagnostics.plane import PlaneMap

UNMAPPED = "#e4e8ec"  # around a map that ends within the frame: white there would read as low confidence
_SIDE, _GAP, _BETWEEN, _LEFT, _RIGHT, _HEAD, _FOOT, _KEY = 3.3, 0.22, 0.36, 0.75, 0.12, 0.92, 0.56, 0.55  # inches
_PANEL_TITLE: dict[str, Any] = {"fontsize": 9, "color": GREY, "pad": 4}


class Clouds(NamedTuple):
    """The hidden states of one method in a plane, and what is predicted there."""

    points: Tensor  # finite, (N, 2)
    targets: Tensor  # class indices, (N,)
    found: PlaneMap | None = None  # the predicted classes; for all methods of a figure or for none


class _Frame(NamedTuple):
    x: tuple[float, float]
    y: tuple[float, float]


def draw_hidden_spaces(
    clouds: Mapping[str, Clouds],
    subsets: Sequence[Sequence[int]],
    heading: str = "Hidden states by class",
    axis_names: Sequence[str] = ("hidden unit 1", "hidden unit 2"),
    class_names: ClassNames | None = None,
) -> Figure:
    """Draw a column per method: a panel for each subset of classes and, beneath, the predicted classes where given.

    How to read it: each point is one example, each colour one class, named at the class median (moved a little where
    names would overlap). All panels have the same axes. Methods may differ in the scale of the layer, which the next
    layer undoes; so tight classes far apart are seen in how much of the way to the other clouds a cloud takes up. That
    is the ``spread_ratio`` of :func:`class_separation`, which stands above each panel for the points of its classes.
    The frame is a square that holds the :func:`square_frame` of every method; points beyond are counted. Where a map
    of the predicted classes ends within the frame there is grey around it. Its colours are those of
    :func:`draw_confidence_map`, with a key at the foot.

    Args:
        clouds: By title of the method.
        subsets: The classes of each row of panels; without any only the maps are drawn.
        heading: Of the figure.
        axis_names: Of the horizontal and the vertical axis.
        class_names: Text for each class, by class index; default is the index.

    Returns:
        A figure unknown to pyplot, so nothing needs closing. Its size depends only on the number of panels.

    Raises:
        ValueError: If only some of the methods have a map, or there is nothing to draw.
    """
    maps = [each.found for each in clouds.values() if each.found is not None]
    if len(maps) not in (0, len(clouds)) or not (maps or subsets):
        raise ValueError(
            f"clouds must have maps for all of {len(clouds)} methods or, with subsets, for none, got {len(maps)}."
        )
    frame = _common_frame(list(clouds.values()))
    figure, panels = _panels(list(clouds), len(subsets) + bool(maps), bool(maps), heading, axis_names, frame)
    for column, each in zip(panels, clouds.values(), strict=True):
        for axes, subset in zip(column, subsets, strict=False):
            _draw_subset(axes, each, subset, frame, class_names)
        if each.found is not None:
            draw_confidence_map(column[-1], each.found, class_names)
            column[-1].set(xlim=frame.x, ylim=frame.y, facecolor=UNMAPPED)
            column[-1].set_title("Class predicted" if subsets else "", loc="left", **_PANEL_TITLE)
    if maps:
        _draw_key(figure, maps[0].num_classes, class_names)
    return figure


def in_class_distances(found: PlaneMap) -> PlaneMap:
    """Return a map in other coordinates: the mean of the class means is 0, their mean distance is 1.

    The layer's scale and place, which the next layer undoes, are taken out, so that methods can be compared.

    Args:
        found: Its points are of two classes at least, whose means differ.
    """
    points = found.points.astype(np.float64)
    means = np.array([points[found.targets == k].mean(axis=0) for k in np.unique(found.targets)])
    distance = torch.pdist(torch.from_numpy(means)).mean().item()
    x, y = means.mean(axis=0)
    points = (points - means.mean(axis=0)) / distance
    return found._replace(x=(found.x - x) / distance, y=(found.y - y) / distance, points=points)


def _common_frame(clouds: Sequence[Clouds]) -> _Frame:
    corners = [corner for each in clouds for corner in square_frame(each.points.double())]
    for found in (each.found for each in clouds if each.found is not None):
        corners += [torch.tensor([found.x[end], found.y[end]], dtype=torch.float64) for end in (0, -1)]
    low, high = torch.stack(corners).amin(dim=0), torch.stack(corners).amax(dim=0)
    middle, half = (low + high) / 2, (high - low).max() / 2
    return _Frame(*zip((middle - half).tolist(), (middle + half).tolist(), strict=True))


def _panels(
    titles: Sequence[str], rows: int, has_key: bool, heading: str, axis_names: Sequence[str], frame: _Frame
) -> tuple[Figure, list[list[Axes]]]:
    above = 0.3 if rows > has_key else 0.08  # panels of classes have titles of their own
    head, foot = _HEAD - 0.3 + above, _FOOT + has_key * _KEY
    width = _LEFT + len(titles) * (_SIDE + _GAP) - _GAP + _RIGHT
    height = head + rows * (_SIDE + _BETWEEN) - _BETWEEN + foot
    figure = titled_figure(width, height, heading, _LEFT)
    panels: list[list[Axes]] = []
    for column, title in enumerate(titles):
        left = _LEFT + column * (_SIDE + _GAP)
        figure.text(left / width, 1 - (head - above) / height, title, fontsize=12, color=INK)
        panels.append([])
        for row in range(rows):
            bottom = foot + (rows - 1 - row) * (_SIDE + _BETWEEN)
            axes = add_panel(figure, left, bottom, _SIDE, _SIDE)
            axes.set(xlim=frame.x, ylim=frame.y, aspect="equal", xlabel=axis_names[0], ylabel=axis_names[1])
            label_outer(axes, is_left=column == 0, is_lowest=row == rows - 1)
            panels[-1].append(axes)
    return figure, panels


def _draw_subset(
    axes: Axes, clouds: Clouds, subset: Sequence[int], frame: _Frame, class_names: ClassNames | None
) -> None:
    member = torch.isin(clouds.targets, torch.tensor(list(subset)))
    points, targets = clouds.points[member], clouds.targets[member]
    notes = []
    if len(points):
        draw_clouds(axes, points, targets, class_names)
    if len(targets.unique()) > 1:
        notes.append(f"spread ratio {class_separation(points, targets)['spread_ratio']:.3f}")
    low, high = (torch.tensor(ends, dtype=points.dtype) for ends in zip(*frame, strict=True))
    if outside := int(((points < low) | (points > high)).any(dim=1).sum()):
        notes.append(f"{outside:,} outside")
    axes.set_title(classes_in_words(subset), loc="left", **_PANEL_TITLE)
    axes.set_title(", ".join(notes), loc="right", **_PANEL_TITLE)


def _draw_key(figure: Figure, num_classes: int, class_names: ClassNames | None) -> None:
    width, height = figure.get_size_inches()
    names = [class_name(k, class_names) for k in range(num_classes)]
    axes = figure.add_axes(
        ((_LEFT + 1.9) / width, 0.27 / height, (width - _LEFT - 1.9 - _RIGHT) / width, 0.15 / height)
    )
    if num_classes == 2:
        text = f"probability of {'class 1' if class_names is None else names[1]}"
        axes.imshow(np.linspace(0, 1, 256)[None], cmap=P_CLASS1, aspect="auto", extent=(0, 1, 0, 1))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    else:
        text = f"confidence, {100 / num_classes:.0f} to 100 %"
        ramps = np.tile(np.linspace(1 / num_classes, 1, 64), num_classes)[None]  # (1, 64 * K)
        classes = np.repeat(np.arange(num_classes), 64)[None]
        extent = (-0.5, num_classes - 0.5, 0, 1)
        axes.imshow(class_colours(ramps, classes, num_classes), aspect="auto", interpolation="nearest", extent=extent)
        axes.set_xticks(range(num_classes), names)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[:].set(color=HAIRLINE, linewidth=0.8)
    figure.text(_LEFT / width, 0.345 / height, text, va="center", fontsize=9, color=GREY)
