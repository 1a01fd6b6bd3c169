import io
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mm_lightning.diagnostics.drawing import (
    add_legend,
    add_panel,
    add_run_title,
    class_name,
    label_outer,
    log_image,
    pixels,
    publish,
    save_figure,
    titled_figure,
    write_numbers,
)


@pytest.mark.parametrize(("letters", "points"), [(10, 13.0), (100, 72 * 3.4 / 69)], ids=["short", "long"])
def test_a_heading_shrinks_until_it_fits(letters: int, points: float):
    figure = titled_figure(4, 3, "m" * letters, 0.5)
    [heading] = figure.texts
    assert heading.get_fontsize() == pytest.approx(points)
    assert heading.get_position() == pytest.approx((0.5 / 4, 1 - 0.12 / 3))
    dark = (pixels(titled_figure(4, 3, "n" * letters, 0.5)) < 128).all(axis=2)  # n is as wide as letters are on average
    assert dark.any()
    margin = 12 if matplotlib.__version_info__ >= (3, 10) else 1  # 0.1 inches; letters were wider before
    assert not dark[:, -margin:].any()


def test_panels_and_numbers_stand_where_the_inches_say():
    figure = titled_figure(4, 3, "heading", 0.5)
    axes = add_panel(figure, 0.5, 1.0, 2.0, 1.5)
    assert axes.get_position().bounds == pytest.approx((0.125, 1 / 3, 0.5, 0.5))
    write_numbers(axes, {"a": "1", "b": "2"}, (0.6, 0.9))
    places = {text.get_text(): tuple(text.get_transform().transform(text.get_position()) / 120) for text in axes.texts}
    want = {"1": (1.0, 0.4), "a": (1.0, 0.1), "2": (2.0, 0.4), "b": (2.0, 0.1)}
    assert places.keys() == want.keys()
    for text, place in want.items():
        assert places[text] == pytest.approx(place)


def test_a_run_is_named_above_the_heading_and_all_else_keeps_its_inches():
    figure = titled_figure(4, 3, "heading", 0.5)
    axes = add_panel(figure, 0.5, 1.0, 2.0, 1.5)
    axes.plot([0, 1], label="line")
    add_legend(figure, axes, 0.5, 0.4)
    before = figure.legends[0].get_bbox_to_anchor().bounds
    add_run_title(figure, "manifold mixup, alpha 1, seed 0")
    assert figure.get_size_inches() == pytest.approx((4, 3.17))
    places = (np.array(axes.get_position().bounds).reshape(2, 2) * (4, 3.17)).ravel()
    assert places == pytest.approx([0.5, 1.0, 2.0, 1.5])
    assert figure.legends[0].get_bbox_to_anchor().bounds == pytest.approx(before)
    heading, run = figure.texts
    assert np.multiply(heading.get_position(), (4, 3.17)) == pytest.approx((0.5, 2.88))
    assert run.get_text() == "manifold mixup, alpha 1, seed 0"
    assert np.multiply(run.get_position(), (4, 3.17)) == pytest.approx((0.5, 3.07))


@pytest.mark.parametrize(("is_left", "is_lowest"), [(True, True), (False, True), (True, False)])
def test_only_outer_panels_are_labelled(is_left: bool, is_lowest: bool):
    axes = add_panel(titled_figure(4, 3, "heading", 0.5), 0.5, 0.5, 2, 2)
    axes.set(xlabel="x", ylabel="y")
    label_outer(axes, is_left, is_lowest)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x" if is_lowest else "", "y" if is_left else "")
    assert axes.xaxis.get_major_ticks()[0].label1.get_visible() == is_lowest
    assert axes.yaxis.get_major_ticks()[0].label1.get_visible() == is_left


def test_classes_are_named_by_their_index_unless_told():
    assert [class_name(2, names) for names in (None, ["a", "b", "c"], {2: "two"})] == ["2", "c", "two"]


@pytest.mark.parametrize("fast_dev_run", [False, True])
def test_a_picture_is_logged_and_written_with_its_data_unless_it_is_a_trial(tmp_path: Path, fast_dev_run: bool):
    logged = []
    logger = SimpleNamespace(log_image=lambda key, images, step: logged.append((key, step, images)))
    trainer = SimpleNamespace(loggers=[logger], global_step=7, fast_dev_run=fast_dev_run)
    figure = titled_figure(4, 3, "heading", 0.5)
    publish(trainer, "name", "val", figure, {"x": np.arange(3)}, tmp_path / "new")
    [(key, step, [image])] = logged
    assert (key, step, image.shape, figure.dpi) == ("name/val", 7, (360, 480, 3), 120)
    difference = np.abs(image.astype(float) - pixels(figure))  # drawn with 120 dots per inch, not reduced from 200
    assert difference.max() > 0
    assert difference.mean() < 1
    assert (tmp_path / "new").exists() != fast_dev_run
    if not fast_dev_run:
        assert {path.name for path in (tmp_path / "new").iterdir()} == {"name_val.png", "name_val.npz"}
        assert np.load(tmp_path / "new" / "name_val.npz")["x"].tolist() == [0, 1, 2]
        figure.savefig(tmp_path / "savefig.png", dpi=200)
        with Image.open(tmp_path / "new" / "name_val.png") as ours, Image.open(tmp_path / "savefig.png") as theirs:
            assert ours.size == (800, 600)
            assert np.array_equal(ours, theirs.convert("RGB"))


def test_failed_save_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = titled_figure(4, 3, "heading", 0.5)
    path = tmp_path / "new" / "picture.png"
    save_figure(figure, path)
    older = path.read_bytes()

    def fill_disk(file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, path)
    assert path.read_bytes() == older
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_failed_picture_of_a_diagnostic_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = SimpleNamespace(loggers=[], global_step=7, fast_dev_run=False)
    publish(trainer, "name", "val", titled_figure(4, 3, "heading", 0.5), {}, tmp_path)
    older = (tmp_path / "name_val.png").read_bytes()

    def fill_disk(self: Image.Image, file: io.BufferedWriter, *_: object, **__: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        publish(trainer, "name", "val", titled_figure(4, 3, "other", 0.5), {}, tmp_path)
    assert (tmp_path / "name_val.png").read_bytes() == older
    assert sorted(file.name for file in tmp_path.iterdir()) == ["name_val.npz", "name_val.png"]


def test_other_loggers_get_pixels_and_none_is_fine():
    class Logger:
        def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
            self.got = (key, images[0].shape, images[0].dtype, step)

    class FakeTrainer:
        loggers = [Logger(), object()]  # noqa: RUF012
        global_step = 7

    log_image(FakeTrainer(), "a/b", pixels(titled_figure(4, 3, "heading", 0.5)))
    assert FakeTrainer.loggers[0].got == ("a/b", (360, 480, 3), np.uint8, 7)
