from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from mm_lightning.diagnostics.drawing import PALETTE, pixels
from mm_lightning.study.small_png import save_small_png


def _ramps() -> Figure:
    """White paper, ten flat colours, a ramp from white to each of them, and shades of white: over 256 colours."""
    figure = Figure(figsize=(6, 3), facecolor="white")
    for k, colour in enumerate(PALETTE):
        hue = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        axes = figure.add_axes((0.05 + 0.09 * k, 0.1, 0.08, 0.35), xticks=[], yticks=[])
        axes.imshow(1 - np.linspace(0, 1, 200)[:, None, None] * (1 - hue), aspect="auto")
        figure.add_axes((0.05 + 0.09 * k, 0.55, 0.08, 0.35), facecolor=colour, xticks=[], yticks=[])
    axes = figure.add_axes((0.05, 0.02, 0.9, 0.06), xticks=[], yticks=[])
    axes.imshow(1 - np.linspace(0, 0.03, 400)[None, :, None] * [0.2, 0.6, 1.0], aspect="auto")
    return figure


def test_few_colours_look_like_all_of_them(tmp_path: Path):
    figure = _ramps()
    path = save_small_png(figure, tmp_path / "new" / "small.png", 600)
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("P", (600, 300))
        got = image.convert("RGB")
    want = Image.fromarray(pixels(figure))
    assert len(want.getcolors(600 * 300)) > 256
    white = (np.asarray(want) == 255).all(axis=2)
    assert (np.asarray(got)[white] == 255).all()
    # as the eye sees dots of a few pixels
    near = [np.asarray(image.filter(ImageFilter.BoxBlur(2))).astype(float) for image in (got, want)]
    assert np.abs(near[0] - near[1]).mean() < 0.3
    assert np.quantile(np.abs(near[0] - near[1]), 0.999) < 6


def test_a_failure_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "small.png"
    path.write_bytes(b"older")

    def fill_the_disk(self: Image.Image, file: object, **settings: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_small_png(Figure(), path, 100)
    assert path.read_bytes() == b"older"
    assert [each.name for each in tmp_path.iterdir()] == ["small.png"]
