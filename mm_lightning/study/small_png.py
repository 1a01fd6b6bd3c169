"""Figures as PNG files small enough for a page that embeds many of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mm_lightning.diagnostics.drawing import pixels
from mm_lightning.files import whole_file


def save_small_png(figure: Figure, path: Path, width: int) -> Path:
    """Write a figure as a PNG file of 256 colours, dithered, about a third of the size, whole or not at all.

    Args:
        figure: The picture; its dpi is set.
        path: Target; missing folders are made.
        width: Of the picture, in pixels.

    Returns:
        The path written.
    """
    figure.set_dpi(width / figure.get_figwidth())
    drawn = pixels(figure)
    image = Image.fromarray(drawn)
    # One pixel in four tells the colours.
    palette = Image.fromarray(np.ascontiguousarray(drawn[::2, ::2])).quantize(255, kmeans=1)
    palette.putpalette([255, 255, 255, *(palette.getpalette() or [])[: 3 * 255]])
    # dithered: ramps of ten hues would have steps
    small = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    small.paste(0, mask=Image.fromarray((drawn == 255).all(axis=2)))  # Pillow looks no closer than four levels
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        small.save(file, format="png", optimize=True)
    return path
