from __future__ import annotations

import math

import pytest

from mm_lightning.study.form import Experiment, Measure
from mm_lightning.study.tables import CHART_HEIGHT, claims, count, shown, tables

PERCENT: Measure = {
    **{"key": "test/acc", "title": "test accuracy", "unit": "%", "factor": 100, "digits": 1},
    **{"better": "higher", "meaning": "", "margin": 0.005},
}


@pytest.mark.parametrize(
    ("value", "sign", "want"),
    [
        (0.9345, "-", "93.5"),
        (-0.021, "-", "−2.1"),
        (0.021, "+", "+2.1"),
        (-0.021, "+", "−2.1"),
        (-0.0004, "+", "0.0"),
        (0.0004, "+", "0.0"),
        (12.5, "-", "1,250.0"),
        (None, "+", "–"),
        (math.nan, "-", "–"),
        (-math.inf, "-", "–"),
    ],
)
def test_numbers_are_displayed_with_factor_digits_and_true_minus(value: float | None, sign: str, want: str):
    assert shown(value, PERCENT, sign) == want


def test_nouns_follow_their_number():
    assert [count(n, "seed") for n in (0, 1, 2, 1200)] == ["0 seeds", "1 seed", "2 seeds", "1,200 seeds"]


def test_claims_are_verdicts_in_words(experiment: Experiment):
    accuracy, loss = claims(experiment)
    assert (accuracy.text, accuracy.method, accuracy.against) == ("higher test accuracy", "manifold mixup", "no mixup")
    assert (accuracy.verdict, accuracy.seeds, accuracy.needed, accuracy.agrees) == ("better", "2", "4", True)
    assert (accuracy.difference, accuracy.unit) == ("+3.0 ± 12.7", "pp")  # a difference of percents
    assert (loss.text, loss.difference, loss.unit, loss.agrees) == ("lower test loss", "+0.10", "nats", None)
    assert (loss.outcome, loss.verdict) == ("not distinguishable", "one seed tells nothing")
    assert (loss.seeds, loss.needed) == ("1", "–")


def test_claims_say_margin_and_seeds_that_tell_too_little(experiment: Experiment):
    verdicts = experiment["verdicts"]
    verdicts[0].update(verdict="no difference", margin=0.005, seeds_needed=None, left_out=[3, 5])
    claim = claims(experiment)[0]
    assert claim.verdict == "no difference larger than 0.5 pp"
    assert (claim.needed, claim.seeds) == ("more than 1,000", "2 (without 3, 5)")
    verdicts[0].update(margin=None)
    assert claims(experiment)[0].verdict == "no difference"


def test_a_claim_without_values_is_a_dash(experiment: Experiment):
    experiment["verdicts"][0].update(difference=None, half_width=None)
    claim = claims(experiment)[0]
    assert (claim.difference, claim.unit) == ("–", "")


def test_cells_hold_mean_and_sd(experiment: Experiment):
    default, reference = tables(experiment)
    assert (default.seeds, default.has_charts) == ("2 seeds", True)
    assert (reference.seeds, reference.has_charts) == ("1 seed", False)
    texts = [[(cell.text, cell.note) for cell in row.cells] for row in default.rows]
    assert texts == [[("91.0 ± 1.4", ""), ("94.0 ± 1.4", "")], [("0.30 ± 0.07", ""), ("0.40", "1 of 2 seeds")]]
    texts = [[cell.text for cell in row.cells] for row in reference.rows]  # a cell that is missing is a dash
    assert texts == [["90.0", "95.0"], ["0.25", "–"]]


def marked(experiment: Experiment) -> list[list[bool]]:
    return [[cell.is_best for cell in table.rows[0].cells] for table in tables(experiment)]


def test_what_is_better_than_all_others_is_marked(experiment: Experiment):
    assert marked(experiment) == [[False, False]] * 2  # 5 and 1 points better; one seed
    experiment["runs"][3]["metrics"]["test/acc"] = 0.969  # 5 and 4.9 points
    assert marked(experiment) == [[False, True], [False, False]]
    experiment["measures"][0]["better"] = "lower"
    assert marked(experiment) == [[True, False], [False, False]]
    third = [{**run, "method": "input"} for run in experiment["runs"] if run["method"] == "manifold"]
    experiment["methods"].append({"name": "input", "title": "input mixup"})
    experiment["runs"] += third  # type: ignore[arg-type]
    experiment["measures"][0]["better"] = "higher"
    assert marked(experiment) == [[False] * 3] * 2  # as good as another one


def test_dots_lie_on_one_scale_in_the_order_of_seeds(experiment: Experiment):
    row = tables(experiment)[0].rows[0]
    assert (row.low, row.high) == ("90.0", "95.0")
    top, bottom = 6, CHART_HEIGHT - 6

    def place(percent: float) -> float:
        return bottom + (percent - 90) / (95 - 90) * (top - bottom)

    for cell, values in zip(row.cells, ([90, 92], [95, 93]), strict=True):
        assert [dot.y for dot in cell.dots] == pytest.approx([place(value) for value in values], abs=0.05)
        assert cell.mean_y == pytest.approx(place(sum(values) / 2), abs=0.05)
        assert [dot.x for dot in cell.dots] == [-5, 5]
        assert [dot.text for dot in cell.dots] == [f"seed {seed}: {value}.0 %" for seed, value in enumerate(values)]
    assert row.first_y == row.cells[0].mean_y


def test_a_seed_without_a_value_leaves_its_place_empty(experiment: Experiment):
    cell = tables(experiment)[0].rows[1].cells[1]
    assert [(dot.x, dot.text) for dot in cell.dots] == [(-5, "seed 0: 0.40 nats")]


def test_values_equal_as_displayed_share_height(experiment: Experiment):
    noise = iter([0.90001, 0.90002, 0.90003, 0.90004])
    for run in experiment["runs"][:4]:
        run["metrics"]["test/acc"] = next(noise)
    for cell in experiment["cells"][:2]:
        cell["mean"] = 0.90002
    row = tables(experiment)[0].rows[0]
    assert {dot.y for cell in row.cells for dot in cell.dots} == {CHART_HEIGHT / 2}
    assert [cell.is_best for cell in row.cells] == [False, False]


def test_measures_without_direction_have_no_best_and_no_verdict(experiment: Experiment):
    experiment["measures"][0]["better"] = None
    assert not any(cell.is_best for table in tables(experiment) for cell in table.rows[0].cells)
    with pytest.raises(ValueError, match="judges 'test/acc', a measure whose 'better' is None"):
        claims(experiment)


def test_measures_without_values_are_dashes(experiment: Experiment):
    for run in experiment["runs"]:
        run["metrics"]["test/loss"] = math.nan
    for cell in experiment["cells"]:
        cell["mean"] = math.nan
    row = tables(experiment)[0].rows[1]
    assert [(cell.text, cell.note, cell.is_best, cell.dots) for cell in row.cells] == [("–", "", False, [])] * 2
    assert (row.low, row.high, row.first_y) == ("–", "–", None)


def test_schedules_and_methods_without_runs_are_left_out(experiment: Experiment):
    experiment["runs"] = [run for run in experiment["runs"] if run["schedule"] == "default"][1:]
    (table,) = tables(experiment)
    assert table.seeds == "1 to 2 seeds"
    experiment["runs"] = [run for run in experiment["runs"] if run["method"] == "manifold"]
    (table,) = tables(experiment)
    assert [method["name"] for method in table.methods] == ["manifold"]
    assert not any(cell.is_best for row in table.rows for cell in row.cells)  # alone


@pytest.mark.parametrize(
    ("part", "field"), [("runs", "schedule"), ("runs", "method"), ("cells", "key"), ("verdicts", "against")]
)
def test_names_that_were_not_introduced_are_refused(experiment: Experiment, part: str, field: str):
    experiment[part][0][field] = "nobody"  # type: ignore[literal-required]
    with pytest.raises(ValueError, match=rf"'digits' has no {field} 'nobody'\. It has "):
        tables(experiment)
