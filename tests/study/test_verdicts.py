"""Means and verdicts, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from mm_lightning.study.form import Measure, Run
from mm_lightning.study.verdicts import cells, verdict

ACC = Measure(key="acc", title="accuracy", unit="", factor=1, digits=2, better="higher", meaning="", margin=0.05)
NLL = Measure(key="nll", title="NLL", unit="", factor=1, digits=2, better="lower", meaning="", margin=0.05)
FIT = Measure(key="fit", title="fit", unit="", factor=1, digits=2, better=None, meaning="", margin=None)


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
    ("differences", "measure", "outcome"),
    [
        ([0.1, 0.2, 0.15], ACC, "better"),
        ([0.1, 0.2, 0.15], NLL, "worse"),
        ([0.1, 0.2, 0.01], ACC, "not distinguishable"),  # better in every seed
        ([0.001, 0.002, -0.001], ACC, "no difference"),
        ([0.0, 0.0, 0.0], ACC, "no difference"),
        ([0.1, None, 0.101], ACC, "not distinguishable"),  # a method does not gain by a seed in which it failed
        ([0.1], ACC, "not distinguishable"),
        ([None, None], ACC, "not distinguishable"),
    ],
)
def test_verdict_is_that_of_the_paired_differences(
    differences: list[float | None], measure: Measure, outcome: str
) -> None:
    key = measure["key"]
    runs = [run("theirs", seed, **{key: 0.5 * seed}) for seed in range(len(differences))]
    runs += [run("ours", i, **{key: None if one is None else 0.5 * i + one}) for i, one in enumerate(differences)]
    found = verdict(runs, measure, "ours", "theirs", ["default"])
    assert (found["verdict"], found["margin"]) == (outcome, 0.05)
    assert found["seeds"] == len(differences) - differences.count(None)
    assert found["reference_agrees"] is None


def test_verdict_pairs_by_seed_not_by_place() -> None:
    runs = [run("ours", 0, acc=0.9), run("ours", 1, acc=0.5), run("theirs", 1, acc=0.3), run("theirs", 0, acc=0.8)]
    found = verdict([*runs, run("theirs", 2, acc=1.0)], ACC, "ours", "theirs", ["default"])
    assert found["difference"] == pytest.approx(0.15)  # of 0.1 and 0.2
    assert found["half_width"] == pytest.approx(12.7062 * 0.05, rel=1e-5)  # Student's t with one degree of freedom
    assert (found["seeds"], found["left_out"]) == (2, [2])


@pytest.mark.parametrize(
    ("theirs", "agrees"), [(0.8, True), (0.95, False), (0.9, False), (None, None)], ids=["so", "not so", "tie", "NaN"]
)
def test_reference_agrees_where_it_has_the_same_sign(theirs: float | None, agrees: bool | None) -> None:
    runs = [run("ours", seed, acc=0.9 + seed) for seed in range(3)]
    runs += [run("theirs", seed, acc=acc + seed) for seed, acc in enumerate((0.7, 0.71, 0.72))]
    runs += [run("ours", 0, "reference", acc=0.9), run("theirs", 0, "reference", acc=theirs)]
    assert verdict(runs, ACC, "ours", "theirs", ["default", "reference"])["reference_agrees"] is agrees
    # where nothing is better or worse, there is nothing to agree with
    assert verdict(runs[1:3] + runs[4:], ACC, "ours", "theirs", ["default", "reference"])["reference_agrees"] is agrees
    assert verdict(runs[2:4] + runs[5:], ACC, "ours", "theirs", ["default", "reference"])["reference_agrees"] is None


def test_verdict_refuses_what_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="'fit' has no direction"):
        verdict([run("a", 0, fit=1.0), run("b", 0, fit=2.0)], FIT, "a", "b", ["default"])
    with pytest.raises(ValueError, match="No seed of schedule 'default' has both 'a' and 'b'"):
        verdict([run("a", 0, acc=1.0), run("b", 1, acc=2.0)], ACC, "a", "b", ["default"])
