"""Pictures of a small study of two methods, two seeds and two schedules, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mm_lightning.study import confidence_pictures, schedule_runs
from mm_lightning.study.jobs import Job
from mm_lightning.study.pictures import draw_pictures

EXPERIMENT = {"methods": {"plain": {"title": "no mixup"}, "mixed": {"title": "manifold mixup"}}}
SCALES = {"plain": 2.0, "mixed": 1.0}  # of the hidden layer


def _job(folder: Path, method: str, schedule: str, seed: int) -> Job:
    return Job(
        "digits",
        method,
        schedule,
        seed,
        (f"mixup={method}", f"scheduler={schedule}"),
        folder / schedule / method / f"seed{seed}",
    )


def _corners(scale: float, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Four points around the mean of each class; the means are on a line, ``scale`` apart."""
    means = scale * np.arange(num_classes)[:, None, None] * [1.0, 0.0]
    points = means + 0.1 * scale * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    return points.reshape(-1, 2), np.repeat(np.arange(num_classes), 4)


def _map(scale: float, num_classes: int, confidence: float = 0.75) -> dict[str, np.ndarray]:
    points, targets = _corners(scale, num_classes)
    axis = scale * np.linspace(-2, num_classes + 1, 5)
    predicted = np.tile(np.arange(5) * num_classes // 5, (5, 1))
    return {
        **{"x": axis, "y": axis, "confidence": np.full((5, 5), confidence, np.float32)},
        **{"predicted": predicted.astype(np.int16), "num_classes": np.array(num_classes)},
        **{"points": points.astype(np.float32), "targets": targets},
    }


def _frames(scale: float, num_classes: int, epochs: list[int]) -> dict[str, np.ndarray]:
    one = _map(scale, num_classes)
    stacked = {name: np.stack([array] * len(epochs)) for name, array in one.items() if name != "num_classes"}
    # a byte for each confidence, 255 for 1; it rises with the epochs
    levels = np.array([20 * (epoch + 1) for epoch in epochs], np.uint8)[:, None, None]
    stacked["confidence"] = np.broadcast_to(levels, stacked["confidence"].shape).copy()
    # growing, as hidden states do while they are trained
    for name in ("x", "y", "points"):
        stacked[name] *= np.array([epoch + 1.0 for epoch in epochs]).reshape(-1, *[1] * (stacked[name].ndim - 1))
    return {"epochs": np.array(epochs), "num_classes": one["num_classes"], **stacked}


def _leave(job: Job, layer: str, files: dict[str, dict[str, Any]], metrics: dict[str, Any] | None = None) -> None:
    (job.folder / "figures").mkdir(parents=True)
    (job.folder / "config.yaml").write_text(
        f"diagnostics: {{confidence_map: {{layer: {layer}}}, hidden_space: {{layer: blocks.2}}}}"
    )
    (job.folder / "metrics.json").write_text(json.dumps({"metrics": metrics or {}}))
    for name, arrays in files.items():
        np.savez(job.folder / "figures" / f"{name}.npz", **arrays)


Draw = Callable[..., tuple[list[Any], list[Any], dict[str, Figure]]]


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draws without writing, and returns the figures too, by file."""
    figures: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path, width: int) -> None:
        figures[path.relative_to(tmp_path / "report").as_posix()] = figure

    for module in (schedule_runs, confidence_pictures):
        monkeypatch.setattr(module, "save_small_png", keep)
    monkeypatch.setattr(confidence_pictures, "write_animation", lambda draw, count, path: None)
    return lambda jobs, experiment=EXPERIMENT: (*draw_pictures(experiment, jobs, tmp_path / "report"), figures)


def _jobs(folder: Path, schedules: tuple[str, ...] = ("default",), seeds: tuple[int, ...] = (0,)) -> list[Job]:
    # not in the order of the experiment's methods
    return [
        _job(folder, method, schedule, seed)
        for schedule in schedules
        for seed in seeds
        for method in ("mixed", "plain")
    ]


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _points(axes: Any) -> np.ndarray:
    return np.asarray(next(c for c in axes.collections if isinstance(c, PathCollection)).get_offsets())


# which files


@pytest.fixture
def whole_study(tmp_path: Path) -> list[Job]:
    jobs = _jobs(tmp_path, ("default", "reference"), seeds=(0, 1))
    for job in jobs:
        points, targets = _corners(SCALES[job.method], 4)
        values = np.sort(np.random.default_rng(0).random((4, 3)))[:, ::-1]
        spectrum = {"layers": ["blocks.0", "blocks.2"], "classes": range(4), "values_0": values, "values_1": values}
        bins = {"edges": [0, 0.5, 1], "counts": [1, 3], "confidence": [0.4, 0.9], "accuracy": [0, 1]}
        hidden = {"plane": points, "targets": targets}
        files = {
            **{"confidence_map_test": _map(SCALES[job.method], 4), "confidence_map_val": _map(1.0, 4)},
            **{"hidden_space_test": hidden, "hidden_space_train": hidden, "hidden_space_val": hidden},
            **{"spectrum_train": spectrum, "calibration_test": bins},
            "confidence_map_frames": _frames(SCALES[job.method], 4, [0, 4, 9]),
        }
        _leave(job, "blocks.2", files)
    return jobs


def test_a_study_with_everything(whole_study: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule_runs, "WIDTH", 120)
    monkeypatch.setattr(confidence_pictures, "FRAME_WIDTH", 90)
    folder = tmp_path / "report"
    pictures, players = draw_pictures(EXPERIMENT, whole_study, folder)
    first = [
        *["digits_confidence_map.png", "digits_hidden_space_test.png", "digits_hidden_space_train.png"],
        *["digits_spectra_blocks.0.png", "digits_spectra_blocks.2.png", "digits_spectrum_summary.png"],
        "digits_reliability.png",
    ]
    other = [
        *["digits_confidence_map_reference.png", "digits_hidden_space_test_reference.png"],
        "digits_hidden_space_train_reference.png",
    ]
    assert [picture["file"] for picture in pictures] == first + other
    frames = [f"frames/digits_{epoch}.png" for epoch in ("01", "05", "10")]
    assert [player["files"] for player in players] == [frames]
    assert players[0]["labels"] == ["epoch 1", "epoch 5", "epoch 10"]
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert written == {*first, *other, *frames, "digits_confidence_map.gif"}
    assert {_size(folder / file)[0] for file in first + other} == {120}
    sizes = {_size(folder / file) for file in frames}
    assert [size[0] for size in sizes] == [90]
    with Image.open(folder / "digits_confidence_map.gif") as animation:
        assert (animation.n_frames, animation.width) == (3, 90)

    ends = [picture["caption"][-40:] for picture in pictures]
    assert [end.endswith("Seed 0, default schedule.") for end in ends] == [True] * 3 + [False] * 7
    assert [end.endswith("Seeds 0, 1, default schedule.") for end in ends] == [False] * 3 + [True] * 4 + [False] * 3
    assert [end.endswith("Seed 0, reference schedule.") for end in ends] == [False] * 7 + [True] * 3
    assert [picture["title"].endswith(", reference schedule") for picture in pictures] == [False] * 7 + [True] * 3
    runs = {job.command: (job.schedule, job.method, job.seed) for job in whole_study}
    for picture in pictures + players:
        schedule = "reference" if "reference" in picture["title"] else "default"
        seeds = (0, 1) if "Seeds 0, 1" in picture["caption"] else (0,)
        want = [(schedule, method, seed) for method in ("plain", "mixed") for seed in seeds]
        assert [runs[command] for command in picture["commands"]] == want
        assert "no mixup, manifold mixup" in picture["alt"]


@pytest.mark.parametrize(
    ("kind", "files", "players"),
    [
        ("confidence_map", ["confidence_map"], 1),
        ("hidden_space", ["hidden_space_test", "hidden_space_train"], 0),
        ("spectrum", ["spectra_blocks.0", "spectra_blocks.2", "spectrum_summary"], 0),
        ("calibration", ["reliability"], 0),
    ],
)
def test_what_no_run_has_is_not_drawn(kind: str, files: list[str], players: int, whole_study: list[Job], draw: Draw):
    jobs = [job for job in whole_study if job.schedule == "default" and job.seed == 0]
    for job in jobs:
        for path in (job.folder / "figures").iterdir():
            if not path.name.startswith(kind):
                path.unlink()
    pictures, found, _ = draw(jobs)
    assert [picture["file"] for picture in pictures] == [f"digits_{file}.png" for file in files]
    assert len(found) == players


def test_a_run_that_lacks_what_another_has_is_left_out_and_named(
    whole_study: list[Job], draw: Draw, capsys: pytest.CaptureFixture[str]
):
    lacking = whole_study[0].folder
    (lacking / "figures" / "confidence_map_test.npz").unlink()
    pictures, _, _ = draw(whole_study)
    assert (
        f"{lacking} holds no figures/confidence_map_test.npz: the picture is drawn without it."
        in capsys.readouterr().err
    )
    assert len(pictures) > 1


def test_methods_of_one_title_are_refused(whole_study: list[Job], draw: Draw):
    methods = {"plain": {"title": "mixup"}, "mixed": {"title": "mixup"}}
    with pytest.raises(ValueError, match="different titles, got mixup, mixup"):
        draw(whole_study, {"methods": methods})


# what is on them


def test_maps_of_inputs_share_axes_and_colours(tmp_path: Path, draw: Draw):
    jobs = _jobs(tmp_path, seeds=(3, 5))
    for job in jobs:
        train = _map(SCALES[job.method], 2, confidence=0.6 if job.seed == 3 else 0.9)
        _leave(job, "input", {"confidence_map_train": train, "confidence_map_test": _map(9.0, 2)})
    pictures, _, figures = draw(jobs)
    assert [picture["file"] for picture in pictures] == ["digits_confidence_map.png"]
    assert pictures[0]["caption"].endswith("Seed 3, default schedule.")
    left, right, _ = figures["digits_confidence_map.png"].axes
    assert [axes.get_title("left") for axes in (left, right)] == ["no mixup", "manifold mixup"]
    assert left.get_xlim() == right.get_xlim() == left.get_ylim() == right.get_ylim() == (-4, 6)
    for axes, method in ((left, "plain"), (right, "mixed")):
        image = axes.get_images()[0]
        assert image.get_clim() == (0, 1)
        # the probability of class 1: 0.4 where class 0 is predicted, 0.6 where class 1 is
        np.testing.assert_allclose(np.asarray(image.get_array())[0], [0.4, 0.4, 0.4, 0.6, 0.6], rtol=1e-6)
        want = _corners(SCALES[method], 2)[0]
        np.testing.assert_allclose(np.sort(_points(axes), axis=0), np.sort(want, axis=0), rtol=1e-6)


def test_hidden_planes_are_in_units_of_the_class_distance(tmp_path: Path, draw: Draw):
    for job in (jobs := _jobs(tmp_path)):
        _leave(job, "blocks.2", {"confidence_map_test": _map(SCALES[job.method], 4)})
    pictures, _, figures = draw(jobs)
    assert "layer blocks.2" in pictures[0]["title"]
    left, right, _ = figures["digits_confidence_map.png"].axes
    # means 0, 1, 2, 3 on a line have the mean 1.5, and distances 1, 1, 1, 2, 2, 3 of mean 10 / 6
    want = (_corners(1.0, 4)[0] - [1.5, 0]) / (10 / 6)
    for axes in (left, right):  # whatever the scale of the layer
        np.testing.assert_allclose(np.sort(_points(axes), axis=0), np.sort(want, axis=0), atol=1e-6)
        assert axes.get_xlim() == pytest.approx((-3.5 / (10 / 6), 3.5 / (10 / 6)))
        assert axes.get_ylim() == pytest.approx((-2 / (10 / 6), 5 / (10 / 6)))


def test_hidden_spaces_have_a_row_for_half_of_the_classes_for_all_and_for_the_map(whole_study: list[Job], draw: Draw):
    _, _, figures = draw([job for job in whole_study if job.schedule == "reference"])
    for split, rows in (("test", 3), ("train", 2)):
        panels = figures[f"digits_hidden_space_{split}.png"].axes[: 2 * rows]
        assert len({axes.get_xlim() + axes.get_ylim() for axes in panels}) == 1
        assert {np.ptp(axes.get_xlim()) / np.ptp(axes.get_ylim()) for axes in panels} == {1}
        for method, column in (("plain", panels[:rows]), ("mixed", panels[rows:])):
            points, targets = _corners(SCALES[method], 4)
            assert [axes.get_title("left") for axes in column[:2]] == ["Classes 0–1", "Classes 0–3"]
            for axes, shown in zip(column, [points[targets < 2], points, points], strict=False):
                np.testing.assert_allclose(np.sort(_points(axes), axis=0), np.sort(shown, axis=0), rtol=1e-6)
            assert [len(axes.get_images()) for axes in column] == [0, 0, 1][:rows]


def test_hidden_spaces_have_no_map_of_another_plane(tmp_path: Path, draw: Draw):
    points, targets = _corners(1.0, 2)
    hidden = {"plane": points, "targets": targets, "variance": [0.5, 0.2]}
    for job in (jobs := _jobs(tmp_path)):
        _leave(job, "input", {"confidence_map_test": _map(1.0, 2), "hidden_space_test": hidden})
    _, _, figures = draw(jobs)
    panels = figures["digits_hidden_space_test.png"].axes
    assert len(panels) == 2
    assert panels[0].get_xlabel() == "principal component 1"


def test_singular_values_are_of_all_seeds(tmp_path: Path, draw: Draw):
    rng = np.random.default_rng(0)
    values = {}
    for job in (jobs := _jobs(tmp_path, seeds=(0, 1))):
        values[job] = [np.sort(rng.lognormal(size=(2, 5)))[:, ::-1] for _ in range(2)]
        arrays = {"layers": ["stem", "neck"], "classes": [4, 7], "values_0": values[job][0], "values_1": values[job][1]}
        _leave(job, "input", {"spectrum_test": arrays})
    _, _, figures = draw(jobs)
    for place, layer in enumerate(("stem", "neck")):
        figure = figures[f"digits_spectra_{layer}.png"]
        assert [axes.get_title("left") for axes in figure.axes] == ["class 4", "class 7"]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no mixup", "manifold mixup"]
        for k, axes in enumerate(figure.axes):
            for line, method in zip(axes.get_lines(), ("plain", "mixed"), strict=True):
                seeds = [values[job][place][k] for job in jobs if job.method == method]
                np.testing.assert_allclose(line.get_ydata(), (seeds[0] + seeds[1]) / 2)
    rows = [figures["digits_spectrum_summary.png"].axes[i : i + 3] for i in (0, 3)]
    for place, (lines, largest, others) in enumerate(rows):
        assert lines.get_title("left").startswith(f"Layer {('stem', 'neck')[place]}")
        for k, method in enumerate(("plain", "mixed")):
            seeds = np.array([values[job][place] for job in jobs if job.method == method])  # (S, K, D)
            np.testing.assert_allclose(lines.get_lines()[k].get_ydata(), seeds.mean(axis=(0, 1)))
            assert largest.patches[k].get_width() == pytest.approx(seeds[:, :, 0].mean())
            assert others.patches[k].get_width() == pytest.approx(seeds[:, :, 1:].sum(axis=2).mean())


def test_reliability_pools_the_rows_of_all_seeds(tmp_path: Path, draw: Draw):
    nan = np.nan
    bins = {
        0: {"counts": [0, 3, 1], "confidence": [nan, 0.6, 0.9], "accuracy": [nan, 1.0, 0.0]},
        1: {"counts": [0, 1, 3], "confidence": [nan, 0.4, 0.7], "accuracy": [nan, 0.0, 1.0]},
    }
    for job in (jobs := _jobs(tmp_path, seeds=(0, 1))):
        metrics = {"test/calibration/ece": [0.1, 0.3][job.seed], "test/calibration/nll": [0.5, None][job.seed]}
        _leave(job, "input", {"calibration_test": {"edges": [0, 1 / 3, 2 / 3, 1], **bins[job.seed]}}, metrics)
    _, _, figures = draw(jobs)
    panels = figures["digits_reliability.png"].axes
    uppers = [axes for axes in panels if axes.get_title("left")]
    assert [axes.get_title("left") for axes in uppers] == ["no mixup", "manifold mixup"]
    for upper in uppers:
        bars = [patch for patch in upper.patches if isinstance(patch, Rectangle)][:3]
        np.testing.assert_allclose([bar.get_height() for bar in bars], [nan, 3 / 4, 3 / 4])
    for lower in (axes for axes in panels if axes not in uppers):
        bars = [patch for patch in lower.patches if isinstance(patch, Rectangle)]
        assert [bar.get_height() for bar in bars] == [0, 4, 4]
        # 6 of 8 are right; (3 * 0.6 + 0.4 + 0.9 + 3 * 0.7) / 8 = 0.65
        texts = [text.get_text() for text in lower.get_legend().get_texts()]
        assert texts == ["accuracy 75.0%", "mean confidence 65.0%"]
        # of the negative log-likelihood one seed has no value
        assert [text.get_text() for text in lower.texts] == ["0.200", "ECE ↓"]


def test_a_player_shows_the_epochs_that_all_methods_have(tmp_path: Path, draw: Draw):
    epochs = {"plain": [0, 1, 2], "mixed": [1, 2, 3]}
    for job in (jobs := _jobs(tmp_path)):
        _leave(job, "input", {"confidence_map_frames": _frames(SCALES[job.method], 2, epochs[job.method])})
    pictures, players, figures = draw(jobs)
    assert not pictures
    assert players[0]["labels"] == ["epoch 2", "epoch 3"]
    assert players[0]["files"] == ["frames/digits_2.png", "frames/digits_3.png"]
    for epoch, file in ((1, "frames/digits_2.png"), (2, "frames/digits_3.png")):
        left, right, _ = figures[file].axes
        assert [axes.get_title("left") for axes in (left, right)] == ["no mixup", "manifold mixup"]
        assert left.get_xlim() == right.get_xlim() == (-4 * (epoch + 1), 6 * (epoch + 1))
        for axes in (left, right):
            p = np.asarray(axes.get_images()[0].get_array())
            assert p[0, -1] == pytest.approx(0.5 + 0.5 * 20 * (epoch + 1) / 255)


def test_frames_of_a_growing_hidden_plane_are_of_one_size(tmp_path: Path, draw: Draw):
    for job in (jobs := _jobs(tmp_path)):
        frames = _frames(SCALES[job.method], 3, [0, 1, 2])
        frames["points"][0, -1] += 100.0  # a far point moves the means of the first epoch
        _leave(job, "blocks.2", {"confidence_map_frames": frames})
    _, players, figures = draw(jobs)
    shown = [figures[file] for file in players[0]["files"]]
    assert len({tuple(figure.get_size_inches()) for figure in shown}) == 1
    for figure in shown:
        left, right, _ = figure.axes
        assert left.get_xlim() + left.get_ylim() == right.get_xlim() + right.get_ylim()
    assert shown[0].axes[0].get_xlim() != shown[1].axes[0].get_xlim()
    assert shown[1].axes[0].get_xlim() == pytest.approx(shown[2].axes[0].get_xlim())


def test_players_without_a_common_epoch_are_left_out(tmp_path: Path, draw: Draw):
    epochs = {"plain": [0], "mixed": [1]}
    for job in (jobs := _jobs(tmp_path)):
        _leave(job, "input", {"confidence_map_frames": _frames(1.0, 2, epochs[job.method])})
    assert draw(jobs)[:2] == ([], [])
