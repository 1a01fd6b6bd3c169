"""The picture of how the methods of a study learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mm_lightning.study import curves
from mm_lightning.study.curves import draw_curves, picture_of_curves

FIRST, MIXING, BROKEN = "no mixup", "manifold mixup (alpha 2.0)", "weight decay 0.01"
# four epochs of two seeds; the panels hold the second half, from epoch 2.5 on
CURVES: dict[str, Any] = {
    FIRST: [{1: -9.0, 2: 0.5, 3: 0.6, 4: 0.7}, {1: 0.2, 2: 0.7, 3: 0.8, 4: 0.9}],
    MIXING: [{1: 0.0, 2: 0.2, 3: 0.7, 4: 0.85}, {1: 0.0, 2: 0.4, 3: 0.9, 4: 0.95}],
    BROKEN: [{1: 0.3, 2: None, 3: 0.7, 4: math.inf}, {1: 0.3, 2: 0.5, 3: 0.7, 4: 0.9}],
}


def _texts(figure: Figure) -> list[list[str]]:
    return [[text.get_text() for text in axes.texts] for axes in figure.axes]


def test_each_method_has_a_panel_with_its_seeds_and_the_first_one() -> None:
    figure = draw_curves(CURVES, "val/acc")
    assert len(figure.axes) == 2
    mine, first, smallest, largest = figure.axes[0].get_lines()
    assert mine.get_xdata().tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(mine.get_ydata(), [0, 0.3, 0.8, 0.9])
    np.testing.assert_allclose(first.get_ydata(), [-4.4, 0.6, 0.7, 0.8])
    np.testing.assert_allclose(smallest.get_ydata(), [-9, 0.5, 0.6, 0.7])
    np.testing.assert_allclose(largest.get_ydata(), [0.2, 0.7, 0.8, 0.9])
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    ends = [sorted(set(corners[corners[:, 0] == epoch][:, 1])) for epoch in (2, 3, 4)]
    np.testing.assert_allclose(ends, [[0.2, 0.4], [0.7, 0.9], [0.85, 0.95]])


def test_lines_differ_without_colour() -> None:
    mine, first, smallest, largest = draw_curves(CURVES, "val/acc").axes[0].get_lines()
    assert mine.get_linestyle() == "-"
    assert {line.get_linestyle() for line in (first, smallest, largest)} == {"--"}
    assert curves._FIRST["ls"] != curves._EDGE["ls"]
    assert mine.get_linewidth() > 1.5 * first.get_linewidth()


def test_panels_share_axes_that_hold_the_second_half_of_training() -> None:
    left, right = draw_curves(CURVES, "val/acc").axes
    assert left.get_ylim() == right.get_ylim() == pytest.approx((0.6 - 0.06 * 0.35, 0.95 + 0.06 * 0.35))
    assert left.get_xlim() == right.get_xlim() == pytest.approx((1 - 0.09, 4 + 0.09))
    assert (left.get_ylabel(), right.get_ylabel()) == ("val/acc", "")
    assert (left.get_xlabel(), right.get_xlabel()) == ("epoch", "epoch")


def test_a_panel_says_where_its_line_ends() -> None:
    assert _texts(draw_curves(CURVES, "val/acc")) == [
        [MIXING, "ends 0.100 above no mixup"],
        [BROKEN, "no value at the end to compare"],
    ]
    flat = {FIRST: [{1: 5.0, 2: 5.0}], "same": [{1: 1.0, 2: 5.001}], "less": [{1: 9.0, 2: 4.0}], "none": [{}]}
    assert [note for _, note in _texts(draw_curves(flat, "val_loss"))] == [
        "ends where no mixup does",
        "ends 1.00 below no mixup",
        "no value at the end to compare",
    ]


def test_a_gap_is_left_where_a_seed_has_no_value() -> None:
    broken = draw_curves(CURVES, "val/acc").axes[1].get_lines()[0]
    np.testing.assert_allclose(broken.get_ydata(), [0.3, np.nan, 0.7, np.nan])


def test_one_seed_and_one_epoch_are_a_dot_without_a_band() -> None:
    (axes,) = draw_curves({FIRST: [{3: 0.5}], MIXING: [{3: 0.6}]}, "val/acc").axes
    assert [line.get_marker() for line in axes.get_lines()] == ["o", "o"]
    assert not axes.collections
    assert [tick for tick in axes.get_xticks() if 2.5 <= tick <= 3.5] == [3]


@pytest.mark.parametrize(
    ("methods", "places"), [(1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2])], ids=["one", "three", "four", "five"]
)
def test_panels_are_in_rows_and_titles_within_the_picture(methods: int, places: list[int]) -> None:
    long = [f"manifold mixup until {place} % of all training (alpha 2.0)" for place in range(methods)]
    figure = draw_curves({FIRST: CURVES[FIRST], **dict.fromkeys(long, CURVES[MIXING])}, "val/acc")
    rows = sorted({round(axes.get_position().y0, 6) for axes in figure.axes}, reverse=True)
    assert [sum(round(axes.get_position().y0, 6) == row for axes in figure.axes) for row in rows] == places
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.texts[0].get_window_extent().x1 <= axes.bbox.x1 + 0.2 * figure.dpi
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert legend.get_window_extent().y0 > max(axes.texts[0].get_window_extent().y1 for axes in figure.axes)


def test_the_picture_is_written_and_described(tmp_path: Path) -> None:
    picture = picture_of_curves(CURVES, "val/acc", tmp_path / "curves.png")
    assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")
    assert picture["alt"] == f"val/acc by epoch, a panel for each of {MIXING}, {BROKEN}, each against no mixup"
    assert "dashed is no mixup, dotted its smallest and largest seed" in picture["caption"]
