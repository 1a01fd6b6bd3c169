"""The command mm-study: what it is told, what it asks of a run, and a whole study, interrupted and gone on with."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf
from own_process import Running, run_module

from mm_lightning.command import study as command
from mm_lightning.command.configuration import CONF
from mm_lightning.study.candidates import methods_of
from mm_lightning.study.course import FIRST_SEARCH_SEED, Course, Objective, Plan

CLASSIFIER = {
    "val/acc": 0.9,
    "val/evaluation/acc": 0.9,
    "test/acc": 0.8,
    "test/evaluation/acc": 0.8,
    "test/evaluation/nll": 0.3,
}
REGRESSION = {"val_loss": 1.0, "val_r2": 0.5, "test_loss": 1.1, "test_r2": 0.4, "train_loss": 0.1}


@pytest.mark.parametrize(
    ("metric", "metrics", "objective"),
    [
        ("auto", CLASSIFIER, Objective("val/evaluation/acc", "higher")),
        ("auto", REGRESSION, Objective("val_r2", "higher")),
        ("auto", {**CLASSIFIER, "val/mse": 0.5}, Objective("val/acc", "higher")),
        ("auto", {"val/evaluation/acc": 0.5, "val_mse": 0.5}, Objective("val_mse", "lower")),
        ("val_loss", REGRESSION, Objective("val_loss", "lower")),
    ],
)
def test_what_strengths_are_chosen_by(metric: str, metrics: dict[str, float], objective: Objective) -> None:
    assert command.objective_of(metric, metrics) == objective


@pytest.mark.parametrize(
    ("metric", "metrics", "words"),
    [
        (
            "auto",
            {"train_loss": 1.0},
            r"a metric of a validation, such as 'val/acc' or 'val_loss', is not logged. Logged are tr",
        ),
        ("val_f1", REGRESSION, r"mm-study chooses by validation, and 'val_f1' is not logged"),
        ("test_r2", REGRESSION, r"metric 'test_r2' is of test data, which choose nothing"),
        ("train_loss", REGRESSION, r"metric 'train_loss' is of training data, which choose nothing"),
        ("auto", {"test/val_acc": 1.0, "train_val_acc": 1.0}, r"a metric of a validation, .* is not logged"),
        ("val_x", {"val_x": 1.0}, r"metric 'val_x' does not tell whether more or less of it is better"),
    ],
)
def test_without_something_to_choose_by_there_is_no_study(metric: str, metrics: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        command.objective_of(metric, metrics)


@pytest.mark.parametrize("seeds", [1, 1001, 2.0])
def test_seeds_of_the_comparison_are_none_of_the_search(seeds: Any) -> None:
    with pytest.raises(ValueError, match=rf"seeds must be an integer in \[2, {FIRST_SEARCH_SEED}\], got {seeds}"):
        command._check_seeds(seeds)
    command._check_seeds(FIRST_SEARCH_SEED)


def test_classifiers_are_compared_by_accuracy_first() -> None:
    measures = command.measures_of(Objective("val/evaluation/acc", "higher"), CLASSIFIER)
    assert [(measure["key"], measure["title"], measure["better"]) for measure in measures] == [
        ("test/evaluation/acc", "accuracy", "higher"),
        ("test/evaluation/nll", "NLL", "lower"),
    ]
    assert [measure["margin"] for measure in measures] == [0.005, 0.02]


def test_others_are_compared_by_what_their_test_logs() -> None:
    measures = command.measures_of(Objective("val_loss", "lower"), REGRESSION)
    assert [(measure["key"], measure["better"]) for measure in measures] == [
        ("test_loss", "lower"),
        ("test_r2", "higher"),
    ]


def test_without_a_test_the_validation_decides() -> None:
    measures = command.measures_of(Objective("val_loss", "lower"), {"val_loss": 1.0})
    assert [measure["key"] for measure in measures] == ["val_loss"]


def test_integers_in_a_batch_make_no_classifier_of_a_regression() -> None:
    found = {"val_mse": 1.0, "test_mse": 1.1, "val/evaluation/acc": 0.5, "test/evaluation/acc": 0.5}
    measures = command.measures_of(Objective("val_mse", "lower"), found)
    assert [measure["key"] for measure in measures] == ["test_mse"]


@pytest.mark.parametrize(
    ("key", "test"),
    [
        ("val_acc", "test_acc"),
        ("validation/acc", "test/acc"),
        ("interval/val_acc", "interval/test_acc"),
        ("eval_acc", "test_acc"),
        ("valAcc", "testAcc"),
    ],
)
def test_the_test_of_a_validation_is_found(key: str, test: str) -> None:
    measures = command.measures_of(Objective(key, "higher"), {key: 0.5, test: 0.5})
    assert [measure["key"] for measure in measures] == [test]


@pytest.mark.parametrize(("value", "factor", "margin"), [(0.9, 100, 0.005), (1.0, 100, 0.005), (90.0, 1, 0.5)])
def test_an_accuracy_may_be_in_per_cent_already(value: float, factor: int, margin: float) -> None:
    (measure,) = command.measures_of(Objective("val_acc", "higher"), {"val_acc": value})
    assert (measure["unit"], measure["factor"], measure["margin"]) == ("%", factor, margin)


WORDS = ["data=spirals", "data.num_points=60", "model=mlp", "max_epochs=2", "budget=20m", "seeds=3", "jobs=2"]
WORDS += ["only=[manifold,weight_decay]", "methods.manifold.values=[2.0]", "methods.weight_decay.values=[0.001,0.01]"]


@pytest.mark.slow
def test_a_study_is_interrupted_goes_on_and_answers(tmp_path: Path) -> None:
    seen = []
    process = Running("mm_lightning.study", *WORDS, cwd=tmp_path)
    while not seen or (seen[-1] and "comparison" not in seen[-1]):
        seen.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.finish().returncode == 130
    assert any(text.startswith("Plan  none, manifold, weight_decay; 4 seeds") for text in seen)
    runs = tmp_path / "study" / "runs"
    first = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/metrics.json")}
    assert len(first) >= 11  # two first runs, eight of the search, and what has interrupted it

    finished = run_module("mm_lightning.study", *WORDS, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert {path: path.stat().st_mtime_ns for path in first} == first
    made = {path.parent.parent.name: path.parent for path in runs.glob("*/seed0/metrics.json")}
    assert set(made) == {"none", "manifold-2.0", *(name for name in made if name.startswith("weight_decay"))}
    assert len(made) == 3
    study = json.loads((tmp_path / "study" / "report" / "metrics.json").read_text())
    experiment = study["experiments"][0]
    assert [run["seed"] for run in experiment["runs"] if run["method"] == "manifold"] == [0, 1, 2]
    # a difference by hand
    accuracies = {
        name: [
            json.loads((folder.parent / f"seed{seed}" / "metrics.json").read_text())["metrics"]["test/evaluation/acc"]
            for seed in range(3)
        ]
        for name, folder in made.items()
    }
    by_hand = sum(a - b for a, b in zip(accuracies["manifold-2.0"], accuracies["none"], strict=True)) / 3
    found = next(one for one in experiment["verdicts"] if one["method"] == "manifold")
    assert (found["key"], found["difference"]) == ("test/evaluation/acc", pytest.approx(by_hand))
    assert (tmp_path / "study" / "report" / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    assert study["title"] in page
    assert study["title"] in finished.stdout
    assert f"Train it  {study['winner']}\n" in finished.stdout
    assert study["winner"].startswith("python -m mm_lightning.train data=spirals data.num_points=60 model=mlp")

    other = run_module("mm_lightning.study", *WORDS[:-1], cwd=tmp_path)
    assert other.returncode == 1
    assert "holds a study of other settings: methods was" in other.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("mixup=input", "the study chooses how to mix"),
        ("mixup.layers=input", "the study chooses how to mix"),
        ("++alpha=1", "the study chooses it"),
        ("seed=3", "the study has seeds=N of its own"),
        ("callbacks=last", "the study's runs have callbacks of their own"),
        ("ckpt_path=last.ckpt", "every run begins anew"),
    ],
)
def test_what_the_study_says_itself_is_refused(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{re.escape(word)}' cannot be said to mm-study: {said}"):
        command.words_of_runs(["model=mlp", word], has_data_seed=False)


def test_runs_are_told_what_is_theirs() -> None:
    typed = ["model=mlp", "budget=2h", "+callbacks.stop._target_=a.B", "methods.input.values=[1.0]", "~logger", "out=x"]
    theirs = ["model=mlp", "+callbacks.stop._target_=a.B", "~logger"]
    assert command.words_of_runs(typed, has_data_seed=False) == theirs
    assert command.words_of_runs(typed, has_data_seed=True) == [*theirs, "data.data_seed=null"]
    assert command.words_of_runs(["data.data_seed=4"], has_data_seed=True) == ["data.data_seed=4"]


@pytest.mark.slow
def test_a_refusal_is_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    finished = run_module("mm_lightning.study", "mixup=input", cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("error: 'mixup=input' cannot be said to mm-study")
    assert finished.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_search_where_the_study_does() -> None:
    def source(provider: str, schema: str, path: str) -> SimpleNamespace:
        return SimpleNamespace(provider=provider, schema=schema, path=path)

    given = source("command-line", "file", "/my conf"), source("hydra.searchpath in command-line", "pkg", "mine.conf")
    assert command.searched([source("main", "file", "/conf"), *given]) == [
        'hydra.searchpath=["file:///my conf","pkg://mine.conf"]'
    ]
    assert command.searched([source("main", "file", "/conf")]) == []


def test_the_method_of_one_s_own_in_the_configuration_can_be_typed() -> None:
    (example,) = re.findall(r"'(\+methods\.mine=.*)'", (CONF / "study.yaml").read_text(encoding="utf-8"))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        methods = hydra.compose("study", [example]).methods
    described: Any = OmegaConf.to_container(methods)
    own = methods_of(described, ["mine"])[1]
    assert [one.words for one in own.candidates] == [("mixup=patchup", "alpha=2.0"), ("mixup=patchup", "alpha=1.0")]


@pytest.mark.parametrize(
    ("words", "of"), [(["data.data_seed=null"], "order and split"), (["data.data_seed=0"], "order")]
)
def test_a_seed_is_of_a_split_where_it_is(words: list[str], of: str) -> None:
    course = Course(Objective("val/acc", "higher"), Plan(("none",), 0))
    assert re.search(rf"a seed is of first weights(,| and) {of} of the data\.", command._text(course, words))
