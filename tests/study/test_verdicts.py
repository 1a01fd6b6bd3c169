"""Means and verdicts, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from mm_lightning.study.form import Measure, Run
from mm_lightning.study.verdicts import cells, verdict

ACC = Measure(key="acc", title="accuracy", unit="", factor=1, digits=2, better="higher", meaning="")
NLL = Measure(key="nll", title="NLL", unit="", factor=1, digits=2, better="lower", meaning="")
FIT = Measure(key="fit", title="fit", unit="", factor=1, digits=2, better=None, meaning="")


def run(method: str, seed: int, schedule: str = "default", **metrics: float | None) -> Run:
    return Run(method=method, schedule=schedule, seed=seed, command="", seconds=1.0, epochs=1, metrics=dict(metrics))


def test_cells_have_mean_and_sample_deviation() -> None:
    runs = [run("a", 0, acc=0.5), run("b", 0, acc=0.1), run("a", 1, acc=0.7), run("a", 2, acc=0.9)]
    first, second = cells(runs, [ACC])
    assert (first["schedule"], first["method"], first["key"], first["values"]) == (
        "default",
        "a",
        "acc",
        [0.5, 0.7, 0.9],
    )
    assert first["mean"] == pytest.approx(0.7)
    assert first["sd"] == pytest.approx(0.2)  # sqrt((0.04 + 0 + 0.04) / 2)
    assert (second["method"], second["mean"], second["sd"]) == ("b", 0.1, None)


@pytest.mark.parametrize("absent", [None, math.nan, math.inf])
def test_cells_leave_out_what_is_no_number(absent: float | None) -> None:
    (cell,) = cells([run("a", 0, acc=absent), run("a", 1, acc=0.25)], [ACC])
    assert (cell["mean"], cell["sd"], cell["values"]) == (0.25, None, [None, 0.25])
    (cell,) = cells([run("a", 0)], [ACC])
    assert (cell["mean"], cell["sd"], cell["values"]) == (None, None, [None])


@pytest.mark.parametrize(
    ("ours", "theirs", "measure", "better_in", "outcome"),
    [
        ([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], ACC, 3, "holds"),
        ([0.9, 0.6, 0.7], [0.8, 0.7, 0.6], ACC, 2, "mixed"),
        ([0.8, 0.7, 0.6], [0.8, 0.7, 0.6], ACC, 0, "fails"),  # equal is not better
        ([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], NLL, 0, "fails"),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], NLL, 3, "holds"),
        ([0.9, None, 0.7], [0.8, 0.7, 0.6], ACC, 2, "mixed"),  # no value is not better
    ],
    ids=["every seed", "some seeds", "equal", "wrong way", "lower", "missing"],
)
def test_verdict_counts_seeds(
    ours: list[float | None], theirs: list[float | None], measure: Measure, better_in: int, outcome: str
) -> None:
    key = measure["key"]
    runs = [run("ours", seed, **{key: value}) for seed, value in enumerate(ours)]
    runs += [run("theirs", seed, **{key: value}) for seed, value in enumerate(theirs)]
    found = verdict(runs, measure, "ours", "theirs", ["default"])
    assert (found["better_in"], found["seeds"], found["verdict"]) == (better_in, 3, outcome)
    assert found["reference_agrees"] is None


def test_verdict_pairs_by_seed_not_by_place() -> None:
    runs = [run("ours", 0, acc=0.9), run("ours", 1, acc=0.5), run("theirs", 1, acc=0.3), run("theirs", 0, acc=0.8)]
    found = verdict([*runs, run("theirs", 2, acc=1.0)], ACC, "ours", "theirs", ["default"])
    assert found["difference"] == pytest.approx(0.15)  # of 0.1 and 0.2
    assert found["sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert (found["seeds"], found["better_in"]) == (2, 2)


@pytest.mark.parametrize(
    ("default", "theirs", "agrees"),
    [(0.8, 0.8, True), (0.8, 0.95, False), (0.8, 0.9, False), (0.8, None, None), (0.9, 0.9, True), (0.9, 0.8, False)],
    ids=["holds", "fails there", "ties there", "unknown there", "ties in both", "ties here"],
)
def test_reference_agrees_where_it_says_the_same(default: float, theirs: float | None, agrees: bool | None) -> None:
    runs = [run("ours", 0, acc=0.9), run("theirs", 0, acc=default)]
    runs += [run("ours", 0, "reference", acc=0.9), run("theirs", 0, "reference", acc=theirs)]
    assert verdict(runs, ACC, "ours", "theirs", ["default", "reference"])["reference_agrees"] is agrees


def test_reference_is_not_asked_about_a_mixed_claim() -> None:
    runs = [run("ours", 0, acc=0.9), run("theirs", 0, acc=0.8), run("ours", 1, acc=0.7), run("theirs", 1, acc=0.8)]
    runs += [run("ours", 0, "reference", acc=0.9), run("theirs", 0, "reference", acc=0.8)]
    found = verdict(runs, ACC, "ours", "theirs", ["default", "reference"])
    assert (found["verdict"], found["reference_agrees"]) == ("mixed", None)


def test_verdict_refuses_what_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="'fit' has no direction"):
        verdict([run("a", 0, fit=1.0), run("b", 0, fit=2.0)], FIT, "a", "b", ["default"])
    with pytest.raises(ValueError, match="No seed of schedule 'default' has both 'a' and 'b'"):
        verdict([run("a", 0, acc=1.0), run("b", 1, acc=2.0)], ACC, "a", "b", ["default"])
