import numpy as np
import pytest
from matplotlib.colors import to_hex

from mm_lightning.study.spectra import STYLES, draw_spectra_by_class, draw_spectrum_summaries


def _spectra(methods: int, seeds: int, classes: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = np.sort(rng.lognormal(1.0, 1.0, (methods, seeds, classes, width)), axis=-1)[..., ::-1]
    return {f"method {place}": stack for place, stack in enumerate(values)}


def test_each_class_has_a_panel_with_the_mean_and_the_range_over_the_seeds():
    spectra = _spectra(methods=3, seeds=4, classes=7, width=5)
    figure = draw_spectra_by_class(spectra, range(10, 17), "Heading")
    assert [axes.get_title("left") for axes in figure.axes] == [f"class {k}" for k in range(10, 17)]
    assert len({axes.get_xlim() + axes.get_ylim() for axes in figure.axes}) == 1
    for place, axes in enumerate(figure.axes):
        assert axes.get_yscale() == "log"
        for line, band, style, stack in zip(axes.get_lines(), axes.collections, STYLES, spectra.values(), strict=False):
            np.testing.assert_allclose(line.get_ydata(), stack[:, place].mean(axis=0))
            assert to_hex(line.get_color()) == style["color"]
            assert line.get_marker() == style["marker"]
            corners = band.get_paths()[0].vertices
            for rank in range(1, 6):
                ends = corners[corners[:, 0] == rank][:, 1]
                assert ends.min() == pytest.approx(stack[:, place, rank - 1].min())
                assert ends.max() == pytest.approx(stack[:, place, rank - 1].max())
        assert len(axes.get_lines()) == len(axes.collections) == 3
    labelled = [axes.get_xlabel() for axes in figure.axes]
    assert labelled == ["", "", "rank", "rank", "rank", "rank", "rank"]  # five panels, and two below the first two
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(spectra)


def test_one_seed_has_no_band():
    spectra = {title: stack[0] for title, stack in _spectra(2, 1, 2, 50).items()}
    axes = draw_spectra_by_class(spectra, [0, 1], class_names=["cat", "dog"]).axes
    assert [each.get_title("left") for each in axes] == ["cat", "dog"]
    assert not axes[0].collections
    assert axes[0].get_xscale() == "log"


@pytest.mark.parametrize("row", [0, 1])
def test_summary_shows_means_over_classes_and_each_seed(row: int):
    spectra = _spectra(methods=2, seeds=3, classes=4, width=6)
    other = {title: 2 * stack[..., :5] for title, stack in spectra.items()}
    figure = draw_spectrum_summaries({"Stem": spectra, "Neck": other} if row == 0 else {"Neck": other, "Stem": spectra})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(spectra)
    lines, *bars = figure.axes[3 * row : 3 * row + 3]
    assert [axes.get_title("left").split(",")[0] for axes in (lines, *bars)] == ["Stem"] * 3
    for line, band, stack in zip(lines.get_lines(), lines.collections, spectra.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), stack.mean(axis=(0, 1)))
        last = band.get_paths()[0].vertices
        last = last[last[:, 0] == 6][:, 1]
        seeds = stack[:, :, 5].mean(axis=1)
        assert (last.min(), last.max()) == pytest.approx((seeds.min(), seeds.max()))
    largest = [stack[:, :, 0].mean(axis=1) for stack in spectra.values()]
    others = [stack[:, :, 1:].sum(axis=2).mean(axis=1) for stack in spectra.values()]
    for axes, numbers in zip(bars, (largest, others), strict=True):
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([seeds.mean() for seeds in numbers])
        for dots, seeds in zip(axes.get_lines(), numbers, strict=True):
            np.testing.assert_allclose(dots.get_xdata(), seeds)
        assert [text.get_text() for text in axes.get_yticklabels()] == list(spectra)
        assert [text.get_text() for text in axes.texts] == [f"{seeds.mean():.4g}" for seeds in numbers]


@pytest.mark.parametrize(
    ("spectra", "message"),
    [
        ({}, "1 to 7 methods, got 0"),
        (_spectra(8, 1, 2, 2), "1 to 7 methods, got 8"),
        ({"a": np.ones((2, 3)), "b": np.ones((2, 4))}, r"the same K and D, got .*\(2, 4\)"),
        ({"a": np.ones(3)}, r"must be \(K, D\) or \(S, K, D\)"),
        ({"a": np.ones((3, 3))}, r"a row for each of the 2 classes, got .*\(3, 3\)"),
    ],
    ids=["none", "too many", "widths", "dimensions", "classes"],
)
def test_misfits_are_refused(spectra: dict[str, np.ndarray], message: str):
    with pytest.raises(ValueError, match=message):
        draw_spectra_by_class(spectra, [0, 1])
