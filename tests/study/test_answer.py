"""The sentences that a study ends with, on numbers whose differences are worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from mm_lightning.study.answer import Answer, answer
from mm_lightning.study.candidates import StudyMethod
from mm_lightning.study.collect import measure_of
from mm_lightning.study.course import Course, Objective, Plan
from mm_lightning.study.form import Experiment, Method, Run, Schedule
from mm_lightning.study.verdicts import cells, verdict

NONE = StudyMethod("none", "no mixup", ("mixup=none",), None, (), False)
MANIFOLD = StudyMethod("manifold", "manifold mixup", ("mixup=manifold",), "alpha", (2.0,), False)
INPUT = StudyMethod("input", "input mixup", ("mixup=input",), "alpha", (1.0,), False)
SMOOTHING = StudyMethod("smoothing", "label smoothing", ("mixup=none",), "+callbacks.control.smoothing", (0.1,), True)
SHOWN = {"unit": "%", "factor": 100, "digits": 2, "better": "higher", "meaning": "", "title": "accuracy"}
NLL = {"unit": "nats", "factor": 1, "digits": 3, "better": "lower", "meaning": "", "title": "NLL", "margin": 0.02}
# by seed: with three seeds half a 95 % interval is 2.484 deviations (t = 4.303, over the root of 3)
FLAT = (0.90, 0.91, 0.92)


def study(
    methods: Mapping[StudyMethod, tuple[float, ...]],
    nll: Mapping[StudyMethod, tuple[float, ...]] | None = None,
    about: Mapping[str, Any] = SHOWN,
    key: str = "test/acc",
    left_out: Mapping[str, str] | None = None,
) -> Answer:
    chosen = [method.candidates[0] for method in methods]
    results: dict[Any, dict[str, float]] = {}
    for method, values in methods.items():
        for seed, value in enumerate(values):
            results[method.candidates[0], seed] = {"val/acc": value, "test/acc": value}
            if nll:
                results[method.candidates[0], seed]["test/nll_scaled"] = nll[method][seed]
    measures = [measure_of(key, about)] + ([measure_of("test/nll_scaled", NLL)] if nll else [])
    runs = [
        Run(method=one.method.name, schedule="s", seed=seed, command="", seconds=1, epochs=1, metrics=dict(metrics))
        for (one, seed), metrics in results.items()
    ]
    names = [one.method.name for one in chosen]
    experiment = Experiment(
        name="study",
        title="",
        text="",
        methods=[Method(name=one.method.name, title=one.title) for one in chosen],
        schedules=[Schedule(name="s", text="", seconds_per_run=1)],
        measures=measures,
        runs=runs,
        cells=cells(runs, measures),
        verdicts=[verdict(runs, measure, name, names[0], ["s"]) for measure in measures for name in names[1:]],
        pictures=[],
        players=[],
    )
    course = Course(Objective("val/acc", "higher"), Plan(tuple(names), 0), chosen, dict(results), dict(left_out or {}))
    return answer(experiment, course, ["data=mine"])


def test_a_gain_is_said_with_its_interval_and_its_command() -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.919, 0.93, 0.941)})  # 1.9, 2.0, 2.1: 2.0 ± 0.248
    assert found.sentences == [
        "Use it: manifold mixup (alpha 2.0), +2.00 ± 0.25 points of accuracy over no mixup (3 seeds)."
    ]
    assert found.command == "python -m mm_lightning.train data=mine mixup=manifold alpha=2.0"


def test_a_loss_is_said_as_plainly() -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.881, 0.89, 0.899)})  # -1.9, -2.0, -2.1
    assert found.sentences == [
        "Do not use it here: manifold mixup (alpha 2.0), −2.00 ± 0.25 points of accuracy over no mixup (3 seeds).",
        "Nothing is shown to be better than no mixup here: keep to it.",
    ]
    assert found.command == "python -m mm_lightning.train data=mine mixup=none"


def test_what_cannot_be_told_says_how_many_seeds_would_tell() -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.91, 0.91, 0.93)})  # 1, 0, 1: 0.67 ± 1.43; deviation 0.577
    assert found.sentences[0] == (
        "Not distinguishable from no mixup: manifold mixup (alpha 2.0), +0.67 ± 1.43 points of accuracy over no mixup "
        "(3 seeds); a difference of this size takes about 9 seeds to be seen."
    )


def test_no_difference_is_an_answer() -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.901, 0.91, 0.919)})  # 0.1, 0, -0.1: within half a point
    assert found.sentences[0].startswith("It makes no difference here: manifold mixup (alpha 2.0), 0.00 ± 0.25 points")


@pytest.mark.parametrize(
    ("smoothing", "sentence"),
    [
        # 0.1 over none; mixing is 1.8, 2.0, 2.2 better than it
        ((0.901, 0.91, 0.919), "Label smoothing 0.1 does not explain it: 0.00 ± 0.25 (no difference) over no mixup;"),
        ((0.919, 0.931, 0.94), "Label smoothing 0.1 may do as well: +2.00 ± 0.25 (better) over no mixup;"),
        ((0.95, 0.96, 0.97), "Label smoothing 0.1 does more: +5.00 (not distinguishable) over no mixup;"),
    ],
)
def test_a_control_may_explain_a_gain(smoothing: tuple[float, ...], sentence: str) -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.919, 0.93, 0.941), SMOOTHING: smoothing})
    assert any(one.startswith(sentence) for one in found.sentences), found.sentences


def test_a_control_that_is_better_is_the_winner() -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.881, 0.89, 0.899), SMOOTHING: (0.919, 0.93, 0.941)})
    assert found.sentences[0].startswith("Do not use it here")
    assert found.sentences[-1] == "Of what is better than no mixup, label smoothing 0.1 is the best in validation."
    assert found.command.endswith("mixup=none +callbacks.control.smoothing=0.1")


def test_the_way_that_is_judged_is_the_best_in_validation() -> None:
    found = study({NONE: FLAT, INPUT: (0.92, 0.93, 0.945), MANIFOLD: (0.919, 0.93, 0.941)})
    assert found.sentences[0].startswith("Use it: input mixup (alpha 1.0), +2.17")
    assert found.sentences[1] == (
        "Chosen by validation among the ways to mix; the others, over no mixup: manifold mixup (alpha 2.0) "
        "+2.00 ± 0.25 (better)."
    )


def test_likelihood_after_temperature_is_judged_by_itself() -> None:
    nll = {NONE: (0.5, 0.5, 0.5), MANIFOLD: (0.51, 0.50, 0.49)}
    found = study({NONE: FLAT, MANIFOLD: (0.919, 0.93, 0.941)}, nll)
    # ± 0.01 with three seeds: 0.0248, more than the margin of 0.02
    assert found.sentences[-1] == "NLL after temperature is not distinguishable (0.000 ± 0.025)."


def test_one_seed_tells_nothing() -> None:
    found = study({NONE: (0.9,), MANIFOLD: (0.95,)})
    assert found.sentences[0] == (
        "One seed tells nothing: manifold mixup (alpha 2.0), +5.00 points of accuracy over no mixup (1 seed); a larger "
        "budget goes on from here."
    )


def test_controls_alone_are_said_too() -> None:
    found = study({NONE: FLAT, SMOOTHING: (0.919, 0.93, 0.941)})
    assert found.sentences[0] == "Label smoothing 0.1: +2.00 ± 0.25 points of accuracy over no mixup (3 seeds)."


def test_a_way_whose_validation_is_nan_is_not_the_best() -> None:
    found = study({NONE: FLAT, INPUT: (math.nan,) * 3, MANIFOLD: (0.92, 0.931, 0.939)})
    assert found.sentences[0].startswith("Use it: manifold mixup (alpha 2.0), +2.00")
    assert found.winner.method is MANIFOLD


def test_without_any_value_nothing_is_said() -> None:
    found = study({NONE: FLAT, MANIFOLD: (math.nan,) * 3})
    assert found.sentences[0] == (
        "Nothing can be said of manifold mixup (alpha 2.0): with no seed both it and no mixup have accuracy."
    )


def test_a_seed_without_a_value_is_no_lack_of_seeds() -> None:
    found = study({NONE: (0.90, 0.91, 0.92, 0.9), MANIFOLD: (0.92, 0.931, 0.939, math.nan)})
    assert found.sentences[0].endswith("(3 seeds); with other seeds there is no value, and so no verdict.")


def test_less_is_said_to_be_better_where_it_is() -> None:
    found = study({NONE: (0.4, 0.5, 0.6), MANIFOLD: (0.3, 0.4, 0.51)}, about={**SHOWN, "better": "lower"})
    assert found.sentences[0] == (
        "Use it: manifold mixup (alpha 2.0), −9.67 ± 1.43 points of accuracy (lower is better) over no mixup (3 seeds)."
    )


def test_a_validation_that_judges_what_it_has_chosen_is_said() -> None:
    found = study({NONE: FLAT, MANIFOLD: (0.92, 0.93, 0.94)}, key="val/acc")
    assert any(one.startswith("There is no test of accuracy: the validation that has") for one in found.sentences)
    assert "no test" not in " ".join(study({NONE: FLAT, MANIFOLD: (0.92, 0.93, 0.94)}).sentences)


def test_what_is_left_out_is_said_with_its_reason() -> None:
    found = study({NONE: FLAT, INPUT: (0.92, 0.931, 0.939)}, left_out={"manifold mixup": "no layer can be mixed."})
    assert found.sentences[-1] == "Left out: manifold mixup (no layer can be mixed)."
