"""Pictures of the predicted classes over a plane: panels side by side on one scale, and an animation of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from mm_lightning.diagnostics.clouds import label_classes
from mm_lightning.diagnostics.drawing import (
    GREY,
    HAIRLINE,
    INK,
    PALETTE,
    ClassNames,
    add_panel,
    class_colour,
    class_name,
    label_outer,
    pixels,
    titled_figure,
    write_numbers,
    write_titles,
)
from mm_lightning.diagnostics.plane import PlaneMap
from mm_lightning.diagnostics.plane_numbers import p_class1
from mm_lightning.files import whole_file

# The palette with some white, so that the data, which are darker, stand out.
TINTS = 1 - 0.8 * (1 - np.array([to_rgb(colour) for colour in PALETTE]))
P_CLASS1 = LinearSegmentedColormap.from_list("p_class1", [TINTS[0], "white", TINTS[1]])
UNMAPPED = "#e9ecef"  # around a map that is smaller than its panel: white would read as low confidence
MAX_DRAWN = 1000  # points; more would cover the map
_SIDE, _GAP, _LEFT, _KEY, _HEAD = 3.5, 0.25, 0.65, 1.15, 0.72  # inches


def draw_confidence_map(axes: Axes, found: PlaneMap, class_names: ClassNames | None = None) -> None:
    """Draw one map and the data on it, in equal units on both axes.

    Two classes: the probability of class 1, from 0 in the hue of class 0 over white to 1 in the hue of class 1, with a
    line at 0.5. More classes: the hue is that of the most probable class, the fuller the higher its probability, from
    white at 1 / K to the hue at 1; lines part the classes. The data are dots in a dark shade of their class's hue, a
    thousand of them at most.

    Args:
        axes: Where to draw; what is there stays.
        found: The map and the data.
        class_names: Text for the classes of more than two, at the median of each one's points; default is the index.
    """
    step = [(axis[-1] - axis[0]) / (len(axis) - 1) for axis in (found.x, found.y)]
    ends = (found.x[0], found.x[-1], found.y[0], found.y[-1])
    # a grid point is the middle of its pixel
    extent = (ends[0] - step[0] / 2, ends[1] + step[0] / 2, ends[2] - step[1] / 2, ends[3] + step[1] / 2)
    grid: dict[str, Any] = {"extent": extent, "origin": "lower", "rasterized": True}
    if found.num_classes == 2:
        p = p_class1(found.confidence, found.predicted)
        axes.imshow(p, cmap=P_CLASS1, vmin=0, vmax=1, interpolation="bilinear", **grid)
    else:
        colours = class_colours(found.confidence, found.predicted, found.num_classes)
        axes.imshow(colours, interpolation="nearest", **grid)
    _draw_boundaries(axes, found)
    axes.set(xlim=ends[:2], ylim=ends[2:], aspect="equal")
    _draw_points(axes, found)
    if found.num_classes > 2:
        _label_classes(axes, found, class_names)


def class_colours(confidence: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the colours of a map of many classes: the class's hue, whitened as the confidence falls to 1 / K.

    Args:
        confidence: Probability of the most probable class, in [1 / K, 1], (H, W).
        predicted: That class, (H, W).
        num_classes: K.

    Returns:
        RGB in [0, 1], (H, W, 3).
    """
    fullness = ((confidence - 1 / num_classes) / (1 - 1 / num_classes)).clip(0, 1)[..., None]
    return 1 - fullness * (1 - TINTS[predicted % len(TINTS)])


def draw_confidence_maps(
    maps: Sequence[PlaneMap],
    titles: Sequence[str],
    heading: str,
    axis_names: Sequence[str] = ("x", "y"),
    class_names: ClassNames | None = None,
    numbers: Sequence[Mapping[str, str]] | None = None,
) -> Figure:
    """Draw maps of the same classes side by side, on the same axes and with one key to the colours.

    Args:
        maps: The panels, from left to right.
        titles: Above each panel.
        heading: Of the figure.
        axis_names: Of the horizontal and the vertical axis.
        class_names: Texts for the classes, by class index; default is the index.
        numbers: What is written below each panel, by name.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.

    Raises:
        ValueError: If there is no map, or the maps have different numbers of classes.
    """
    if len({found.num_classes for found in maps}) != 1:
        raise ValueError(f"maps must be of the same classes, got {[found.num_classes for found in maps]} classes.")
    xlim, ylim = _span([found.x for found in maps]), _span([found.y for found in maps])
    panel, foot = _SIDE * (ylim[1] - ylim[0]) / (xlim[1] - xlim[0]), 1.1 if numbers else 0.6
    width, height = _LEFT + len(maps) * (_SIDE + _GAP) + _KEY, foot + panel + _HEAD
    figure = titled_figure(width, height, heading, _LEFT, above=0.15)
    for column, (found, title) in enumerate(zip(maps, titles, strict=True)):
        axes = add_panel(figure, _LEFT + column * (_SIDE + _GAP), foot, _SIDE, panel, UNMAPPED)
        draw_confidence_map(axes, found, class_names)
        axes.set(xlim=xlim, ylim=ylim, xlabel=axis_names[0], ylabel=axis_names[1])
        label_outer(axes, is_left=column == 0)
        write_titles(axes, title, _note(found))
        write_numbers(axes, numbers[column] if numbers else {}, (0.77, 0.97))
    key = figure.add_axes((1 - (_KEY - 0.05) / width, foot / height, 0.2 / width, panel / height))
    if maps[0].num_classes == 2:
        _draw_bar(figure, key, class_names)
    else:
        _draw_ramps(key, maps[0].num_classes, class_names)
    return figure


def write_animation(draw: Callable[[int], Figure], count: int, path: Path) -> None:
    """Write figures of one size as an animated GIF, whole or not at all.

    The last frame stays for two seconds; the others share twelve seconds, and each has 40 to 250 ms.

    Args:
        draw: Draws frame i of 0 ... count - 1.
        count: Number of frames, >= 1.
        path: Target; missing folders are made.
    """
    # one palette for all: with a palette for each frame the colours would flicker
    drawn = {i: pixels(draw(i)) for i in {0, count // 2, count - 1}}
    palette = Image.fromarray(np.concatenate(list(drawn.values()))).quantize(256)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[(colours > 245).all(axis=1)] = 255  # the paper stays white
    palette.putpalette(colours.flatten().tolist())
    images = (Image.fromarray(drawn[i] if i in drawn else pixels(draw(i))) for i in range(count))
    frames = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    each = min(max(12_000 // count, 40), 250)  # milliseconds
    durations = [each] * (count - 1) + [2000]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        next(frames).save(file, format="gif", save_all=True, append_images=frames, duration=durations, loop=0)


def _draw_boundaries(axes: Axes, found: PlaneMap) -> None:
    if found.num_classes == 2:
        heights = [p_class1(found.confidence, found.predicted)]
    else:  # the first class's lines are those of its neighbours
        heights = [_smooth(found.predicted == k) for k in np.unique(found.predicted)[1:]]
    for height in heights:
        if height.min() < 0.5 < height.max():
            axes.contour(found.x, found.y, height, levels=[0.5], colors=INK, linewidths=0.8)


def _smooth(mask: np.ndarray) -> np.ndarray:
    # for the eye: the outline of a mask has steps of one grid point
    height = np.pad(mask.astype(np.float64), 2, mode="edge")
    for _ in range(2):
        height = (height[:-2] + 2 * height[1:-1] + height[2:]) / 4
        height = (height[:, :-2] + 2 * height[:, 1:-1] + height[:, 2:]) / 4
    return height


def _draw_points(axes: Axes, found: PlaneMap) -> None:
    shown = _shown(found)
    x, y = found.points[shown].T
    colours = [_shade(int(k)) for k in found.targets[shown]]
    size = max(5.0, min(14.0, 6000 / max(len(shown), 1)))  # points squared
    axes.scatter(x, y, s=size, c=colours, edgecolors="white", linewidths=0.35, rasterized=True, zorder=3)


def _label_classes(axes: Axes, found: PlaneMap, names: ClassNames | None) -> None:
    classes = np.unique(found.targets).tolist()
    if not classes:
        return
    places = torch.tensor(np.array([np.median(found.points[found.targets == k], axis=0) for k in classes]))
    low, high = torch.tensor([found.x[0], found.y[0]]), torch.tensor([found.x[-1], found.y[-1]])
    label_classes(axes, classes, places.double(), low, high, names, size=9.5, pad=0.2)


def _shown(found: PlaneMap) -> np.ndarray:
    # a shuffle, the same each time: in data sorted by class the first points would be of one class
    return np.random.default_rng(0).permutation(len(found.points))[:MAX_DRAWN]


def _shade(k: int) -> tuple[float, ...]:
    return tuple(0.55 * channel for channel in to_rgb(class_colour(k)))


def _note(found: PlaneMap) -> str:
    drawn, present = len(_shown(found)), len(found.points)
    return f"{present:,} points" if drawn == present else f"{drawn:,} of {present:,} points"


def _span(axes: Sequence[np.ndarray]) -> tuple[float, float]:
    return min(float(axis[0]) for axis in axes), max(float(axis[-1]) for axis in axes)


def _draw_bar(figure: Figure, axes: Axes, names: ClassNames | None) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), P_CLASS1), cax=axes)
    bar.set_label(f"probability of class {class_name(1, names)}", size=10, color=INK)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "0.25", "0.5", "0.75", "1"])
    bar.outline.set(color=HAIRLINE, linewidth=0.8)
    axes.tick_params(length=2.5, width=0.8, color=HAIRLINE, labelsize=8.5, labelcolor=GREY)
    # the two classes' data, where they belong
    axes.scatter([0.5, 0.5], [0.03, 0.97], s=14, c=[_shade(0), _shade(1)], edgecolors="white", linewidths=0.35)


def _draw_ramps(axes: Axes, num_classes: int, names: ClassNames | None) -> None:
    confidence = np.broadcast_to(np.linspace(1 / num_classes, 1, 64), (num_classes, 64))
    classes = np.broadcast_to(np.arange(num_classes)[:, None], confidence.shape)
    colours = class_colours(confidence, classes, num_classes)
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom, 2.4 * width, height))
    axes.imshow(colours, aspect="auto", interpolation="nearest", extent=(0, 1, num_classes - 0.5, -0.5))
    axes.hlines(np.arange(1, num_classes) - 0.5, 0, 1, color="white", linewidth=2)
    axes.set_yticks(range(num_classes), [class_name(k, names) for k in range(num_classes)], color=INK)
    axes.set_xticks([0, 1], [f"{100 / num_classes:.0f} %", "100 %"], color=GREY)
    axes.set_xlabel("confidence", size=8.5, color=GREY)
    axes.yaxis.tick_right()
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set(color=HAIRLINE, linewidth=0.8)
