"""The search for the settings of two published findings: a run's numbers, the geometry of mixed spirals, the tables."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The runs, on forty images of noise, four of each class."""
    module = import_module("unreproduced_runs")
    images = torch.rand(40, 784, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(10).repeat(4)
    monkeypatch.setattr(module, "mnist", lambda: {"train": (images, targets), "test": (images[:20], targets[:20])})
    return module


@pytest.fixture
def made() -> Any:
    return import_module("unreproduced_tables")


def test_singular_values_are_those_of_the_hidden_states_of_each_class(runs: Any) -> None:
    settings = runs.Settings(sizes=(784, 9, 4, 8, 10), mix_before=(2,), inputs="[-1, 1]", slope=0.1, epochs=1, batch=10)
    data = runs.data_of(settings, 0)
    module = runs.fit(settings, 0, data)
    found = runs.numbers_of(module, data, rows=(3, 500))
    assert set(found["spectra"]) == {"1 linear", "1", "2 linear", "2"}
    assert set(found["spectra"]["1"]) == {"3"}  # there are no 500
    images, targets = 2 * runs.mnist()["train"][0].numpy() - 1, runs.mnist()["train"][1].numpy()
    weight, bias = (one.detach().numpy() for one in (module.blocks[0][1].weight, module.blocks[0][1].bias))
    linear = images @ weight.T + bias
    hidden = np.where(linear > 0, linear, 0.1 * linear)
    by_class = [hidden[targets == k][:3].astype(np.float64) for k in range(10)]
    values = np.array([np.linalg.svd(own, compute_uv=False) for own in by_class])
    centred = np.array([np.linalg.svd(own - own.mean(axis=0), compute_uv=False) for own in by_class])
    wanted = [
        number
        for one in (values, centred)
        for number in (one[:, 0].mean(), one[:, 1:].sum(axis=1).mean(), (one[:, 1:] ** 2).sum(axis=1).mean())
    ]
    assert_close(found["spectra"]["1"]["3"], wanted, rtol=1e-4, atol=1e-6)


def test_settings_reach_the_training(runs: Any) -> None:
    small = runs.Settings(sizes=(784, 5, 10), epochs=1, batch=10, lr=0.5)
    data = runs.data_of(small, 0)

    def weights(**changed: Any) -> torch.Tensor:
        return runs.fit(runs.Settings.of({**small.changed(), **changed}), 0, data).blocks[0][1].weight.detach()

    plain = weights()
    assert torch.equal(plain, weights())
    changes: list[dict[str, Any]] = [
        {"mix_before": [1]},
        {"init": "PyTorch"},
        {"init": "He"},
        {"slope": 0.0},
        {"loss": "BCE"},
        {"optimizer": "SGD"},
        {"reshuffled": False},
        {"weight_decay": 0.1},
    ]
    for changed in changes:
        assert not torch.equal(plain, weights(**changed)), changed
    mixed = weights(mix_before=[1])
    for changed in ({"alpha": 0.1}, {"per_sample": True}, {"until": 0.5}):
        assert not torch.equal(mixed, weights(mix_before=[1], **changed)), changed


def test_changed_settings_come_back_from_json(runs: Any) -> None:
    settings = runs.Settings(sizes=(2, 3, 2), mix_before=(0, 1), lr=0.5)
    assert settings.changed() == {"sizes": [2, 3, 2], "mix_before": [0, 1], "lr": 0.5}
    assert runs.Settings.of(settings.changed()) == settings


def test_bce_is_that_of_each_probability(runs: Any) -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # probabilities 3/4 and 1/4
    assert_close(runs.bce_of_softmax(logits, torch.tensor([0])), torch.tensor(-math.log(0.75), dtype=torch.float64))


def test_scales_of_the_images(runs: Any) -> None:
    images = runs.mnist()["train"][0]
    assert_close(runs.INPUTS["normalised"](images), (images - 0.1307) / 0.3081)
    found = runs.standardised(images)
    assert_close(found.mean(dim=0), torch.zeros(784), atol=1e-5, rtol=0)
    assert_close(found.std(dim=0), torch.ones(784))


def test_mixed_points_nearest_to_the_other_class_are_counted() -> None:
    spirals = import_module("unreproduced_spirals")
    # class 1 in the middle between two points of class 0: of the mixtures of these two, half lie nearest to it
    points, targets = np.array([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), np.array([0, 1, 0])
    found = spirals.wrong_labels(points, targets, 1.0, 9_000, np.random.default_rng(0))
    assert found["wrong"] == pytest.approx(1 / 9, abs=4 * math.sqrt(8 / 81 / 9_000))
    assert found["wrong_same"] == pytest.approx(1 / 5, abs=4 * math.sqrt(4 / 25 / 5_000))


def test_best_accuracy_loses_a_class_whose_place_is_mixed_over() -> None:
    spirals = import_module("unreproduced_spirals")
    points = np.array([[-1.05, 0.1], [0.05, 0.1], [1.05, 0.1]])
    targets = np.array([0, 1, 0])
    assert spirals.best_accuracy(points, targets, 1.0, 10_000, np.random.default_rng(0)) == 1
    often = [10, 1, 10]
    many, classes = points.repeat(often, axis=0), targets.repeat(often)
    assert spirals.best_accuracy(many, classes, 1.0, 100_000, np.random.default_rng(0)) == pytest.approx(20 / 21)


def record(method: str, numbers: list[float], **more: Any) -> dict[str, Any]:
    spectra = {layer: {"500": numbers, "4": numbers} for layer in ("1", "2")}
    known = {"group": "flatness", "change": "", "method": method, "seed": 0, "test_acc": 0.5, "train_acc": 1.0}
    return {**known, "test_nll": 0.25, "spectra": spectra, **more}


def test_ways_to_take_the_two_numbers(made: Any) -> None:
    one = record("none", [3.0, 4.0, 10.0, 1.0, 2.0, 6.0])
    assert made.pair(one, made.Way("1", 4, False, "s")) == (3, 4)
    assert made.pair(one, made.Way("1", 4, False, "s / √n")) == (1.5, 2)
    assert made.pair(one, made.Way("1", 4, False, "s² / n")) == (2.25, 2.5)
    assert made.pair(one, made.Way("1", 4, True, "s² / n")) == (0.25, 1.5)
    assert len(list(made.ways(one))) == 2 * 2 * 2 * 3
    assert made.factor_off((2.0, 3.0), (4.0, 2.0)) == pytest.approx(2)


def test_effects_are_ratios_to_the_run_without_mixup_of_the_same_seed(made: Any) -> None:
    runs = [
        record("none", [10.0, 80.0, 0, 0, 0, 0]),
        record("none", [20.0, 90.0, 0, 0, 0, 0], seed=1, test_acc=0.6),
        record("first", [8.0, 40.0, 0, 0, 0, 0]),
        record("first", [12.0, 63.0, 0, 0, 0, 0], seed=1),
        record("first", [5.0, 20.0, 0, 0, 0, 0], change="alpha 1"),
    ]
    lines = made.effects(runs, "flatness", {"first": "mixed"}).splitlines()
    assert lines[0] == "| changed | accuracy, % | largest | others | others, mixed | largest, mixed |"
    assert lines[2] == "| nothing | 55.00 ± 7.07 | 15.0 ± 7.1 | 85.0 ± 7.1 | 0.60 ± 0.14 | 0.70 ± 0.14 |"
    assert lines[3] == "| alpha 1 |  |  |  | 0.25 | 0.50 |"


def test_nearest_candidates_come_first(made: Any) -> None:
    near, far = [51.73, 2 * 78.67, 1, 1, 1, 1], [51.73, 5 * 78.67, 1, 1, 1, 1]
    runs = [record("none", far), record("none", near, change="BCE")]
    lines = made.nearest(runs, ("flatness",), ("1",), 1).splitlines()
    assert lines[0].startswith("| of 24 candidates |")
    assert lines[3] == "| BCE | layer 1, 500 rows, s | 51.73 | 157.34 | 2.000 |"


def test_both_compares_four_numbers(made: Any) -> None:
    runs = [record("none", [51.73, 78.67, 1, 1, 1, 1]), record("first", [31.65, 81.96, 1, 1, 1, 1])]
    lines = made.both(runs, ("flatness",), ("1",), 1).splitlines()
    assert lines[3] == "| nothing changed | first | layer 1, 500 rows, s | 51.73 | 78.67 | 31.65 | 81.96 | 2.000 |"


def test_grid_has_no_run_twice() -> None:
    script = import_module("unreproduced")
    grid = [(one.settings, one.seed) for one in script.grid()]
    assert len(set(grid)) == len(grid)
    assert all(one.settings == one.settings.of(one.settings.changed()) for one in script.grid())


def test_published_numbers_stand_beside_those_of_as_many_rows_as_bring_none_nearest(made: Any) -> None:
    near, far = [50.0, 80.0, 1, 1, 1, 1], [500.0, 800.0, 1, 1, 1, 1]
    mixed = [40.0, 20.0, 1, 1, 1, 1]
    runs = [
        record("none", [], spectra={"1": {"4": near, "500": far}}),
        record("narrow", [], spectra={"1": {"4": mixed, "500": far}}),
    ]
    lines = made.beside_published(runs, (("flatness", "", "narrow", "1"), ("flatness", "not run", "narrow", "1")))
    assert lines.splitlines()[7:] == [
        "| nothing changed: layer 1, 4 rows | none | 50.00 | 50.00 | 80.00 | 1.00 | 1.00 |",
        "| nothing changed: layer 1, 4 rows | manifold | 50.00 | 40.00 | 20.00 | 0.80 | 0.25 |",
    ]
