"""Figures as PNG files small enough for a page that embeds many of them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from matplotlib.figure import Figure
from PIL import Image

from mm_lightning.diagnostics.figures import _pixels
from mm_lightning.record import whole_file

_WHITE = (255, 255, 255)


def save_small_png(figure: Figure, path: Path, width: int) -> Path:
    """Write a figure as a PNG file of 256 colours, about a third of the size, whole or not at all.

    Args:
        figure: The picture; its dpi is set.
        path: Target; missing folders are made.
        width: Of the picture, in pixels.

    Returns:
        The path written.
    """
    figure.set_dpi(width / figure.get_figwidth())
    pixels = _pixels(figure)
    image = Image.fromarray(pixels)
    # frequent colours as they are, and the others so that no rare one is far: else ramps of many hues would have steps
    counts = cast(list[tuple[int, tuple[int, ...]]], image.getcolors(pixels.size))
    frequent = [colour for _, colour in sorted(counts, reverse=True)[:64]]
    palette = image.quantize(255 - len(frequent), Image.Quantize.MAXCOVERAGE, kmeans=1)
    channels = [channel for colour in (_WHITE, *frequent) for channel in colour]
    palette.putpalette(channels + (palette.getpalette() or [])[: 768 - len(channels)])
    small = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    small.paste(0, mask=Image.fromarray((pixels == 255).all(axis=2)))  # Pillow takes a colour for one four levels off
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        small.save(file, format="png", optimize=True)
    return path
