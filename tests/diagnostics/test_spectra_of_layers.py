import numpy as np
import pytest

from mm_lightning.diagnostics.spectra_of_layers import draw_spectrum_summaries
from mm_lightning.diagnostics.spectra_of_methods import draw_spectrum_summary


def _spectra(seed: int, width: int) -> dict[str, np.ndarray]:
    values = np.sort(np.random.default_rng(seed).lognormal(size=(2, 3, 4, width)), axis=-1)[..., ::-1]
    return dict(zip(("no mixup", "manifold mixup"), values, strict=True))


def test_each_layer_has_what_its_own_summary_shows():
    spectra = {"Stem": _spectra(0, 50), "Neck": _spectra(1, 6)}
    figure = draw_spectrum_summaries(spectra)
    assert len(figure.axes) == 6
    for place, (layer, methods) in enumerate(spectra.items()):
        panels = figure.axes[3 * place : 3 * place + 3]
        assert [axes.get_title("left").split(",")[0] for axes in panels] == [layer] * 3
        for got, want in zip(panels, draw_spectrum_summary(methods).axes, strict=True):
            assert got.get_xlim() + got.get_ylim() == want.get_xlim() + want.get_ylim()
            for line, expected in zip(got.get_lines(), want.get_lines(), strict=True):
                np.testing.assert_array_equal(line.get_xydata(), expected.get_xydata())
            assert [bar.get_width() for bar in got.patches] == [bar.get_width() for bar in want.patches]
            assert len(got.collections) == len(want.collections)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no mixup", "manifold mixup"]


def test_more_than_seven_methods_are_refused():
    with pytest.raises(ValueError, match="1 to 7 methods, got 8"):
        draw_spectrum_summaries({"Stem": {str(k): np.ones((2, 3)) for k in range(8)}})
