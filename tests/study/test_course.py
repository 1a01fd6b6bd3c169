"""A study's course, on trainings that are made up: what is chosen, what is compared, what fits into a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mm_lightning.study.candidates import Candidate, StudyMethod, methods_of
from mm_lightning.study.course import FIRST_SEARCH_SEED, Course, Failure, Objective, Plan, Trial, run_course
from mm_lightning.study.halving import best_of

METHODS = [
    StudyMethod("none", "no mixup", ("mixup=none",), None, (), False),
    StudyMethod("input", "input mixup", ("mixup=input",), "alpha", (1.0, 0.2, 2.0), False),
    StudyMethod("smoothing", "label smoothing", (), "+callbacks.control.smoothing", (0.1, 0.2), True),
]
OBJECTIVE = Objective("val/acc", "higher")


class MadeUp:
    """Trainings that take ten seconds, two at a time, and score what a function says."""

    def __init__(self, budget: float, score: Any = lambda candidate, seed: 0.5) -> None:
        self.at_once, self.budget, self.score = 2, budget, score
        self.done: dict[Trial, Mapping[str, float] | Failure] = {}
        self.stages: list[tuple[str, Trial]] = []

    def left(self) -> float:
        return self.budget - 10 * len(self.done) / self.at_once

    def seconds_per_run(self) -> float:
        return 10.0

    def are_finished(self, trials: Sequence[Trial]) -> bool:
        return all(trial in self.done for trial in trials)

    def train(
        self, stage: str, trials: Sequence[Trial], is_limited: bool = False
    ) -> Mapping[Trial, Mapping[str, float] | Failure]:
        for trial in trials:
            if trial not in self.done:
                score = self.score(*trial)
                self.done[trial] = score if isinstance(score, Failure) else {"val/acc": score, "test/acc": 1 - score}
                self.stages.append((stage, trial))
        return {trial: self.done[trial] for trial in trials}


def run(trainings: MadeUp, seeds: int = 3, plan: Plan | None = None) -> Course:
    return run_course(METHODS, seeds, trainings, lambda metrics: OBJECTIVE, plan)


def names(course: Course) -> list[str]:
    return [candidate.name for candidate in course.chosen]


def test_the_best_strength_in_validation_is_compared_with_seeds_of_its_own() -> None:
    best = {"input-2.0": 0.9, "input-0.2": 0.7, "smoothing-0.2": 0.8}
    trainings = MadeUp(1e6, lambda candidate, seed: best.get(candidate.name, 0.5) + seed % 10 / 1000)
    course = run(trainings)
    assert names(course) == ["none", "input-2.0", "smoothing-0.2"]
    assert course.seeds == [0, 1, 2]
    searched = {(trial[0].name, trial[1]) for stage, trial in trainings.stages if stage == "search"}
    # four seeds: two for all, and two more for those that Optuna promotes: the first one of a method, and whoever is
    # the best of all before it
    assert searched == {
        (name, seed)
        for name in ("input-1.0", "input-0.2", "input-2.0", "smoothing-0.1", "smoothing-0.2")
        for seed in (1000, 1001, 1002, 1003)
    }
    assert course.searched[course.chosen[1]] == (pytest.approx(0.9015), 4)


def test_what_is_worse_than_before_is_not_trained_on() -> None:
    course_of = MadeUp(1e6, lambda candidate, seed: {"input-1.0": 0.9, "smoothing-0.1": 0.8}.get(candidate.name, 0.5))
    course = run(course_of)
    assert names(course) == ["none", "input-1.0", "smoothing-0.1"]
    late = [trial[0].name for stage, trial in course_of.stages if stage == "search" and trial[1] >= 1002]
    assert sorted(set(late)) == ["input-1.0", "smoothing-0.1"]


def test_lower_is_better_where_the_objective_says_so() -> None:
    methods = [METHODS[1].candidates]

    def train(trials: Sequence[Trial]) -> dict[Trial, float]:
        return {trial: {1.0: 3.0, 0.2: 1.0, 2.0: 2.0}[trial[0].value] for trial in trials}

    assert [one.value for one in best_of(methods, [0, 1], "lower", train) if one] == [0.2]
    assert [one.value for one in best_of(methods, [0, 1], "higher", train) if one] == [1.0]


@pytest.mark.parametrize("wrong", [math.nan, Failure("no layer can be mixed. See log.txt.")])
def test_a_strength_without_a_score_is_not_chosen(wrong: Any) -> None:
    course = run(MadeUp(1e6, lambda candidate, seed: wrong if candidate.name == "input-1.0" else 0.5))
    assert names(course) == ["none", "input-0.2", "smoothing-0.1"]
    assert course.left_out == {}


def test_a_method_that_fails_is_left_out_with_its_reason() -> None:
    refused = Failure("no layer can be mixed. See log.txt.")
    course = run(MadeUp(1e6, lambda candidate, seed: refused if candidate.method.name == "input" else 0.5))
    assert names(course) == ["none", "smoothing-0.1"]
    assert course.left_out == {"input mixup": "no layer can be mixed. See log.txt."}


def test_a_method_that_fails_in_the_comparison_is_left_out() -> None:
    def score(candidate: Candidate, seed: int) -> Any:
        return Failure("out of memory") if candidate.method.name == "input" and seed == 2 else 0.5

    course = run(MadeUp(1e6, score))
    assert names(course) == ["none", "smoothing-0.1"]
    assert course.left_out == {"input mixup": "out of memory"}
    assert course.seeds == [0, 1, 2]


@pytest.mark.parametrize("seed", [2, FIRST_SEARCH_SEED])
def test_a_study_of_none_alone_is_none(seed: int) -> None:
    def score(candidate: Candidate, at: int) -> Any:
        return Failure("no layer can be mixed.") if candidate.method.name != "none" and at >= seed else 0.5

    with pytest.raises(
        RuntimeError,
        match=r"^No method is left .*no mixup\. input mixup: no layer can be mixed; label smoothing: no",
    ):
        run(MadeUp(1e6, score))


def test_without_the_first_run_there_is_no_study() -> None:
    with pytest.raises(RuntimeError, match=r"^The first run, which mixes nothing, has failed: no such data$"):
        run(MadeUp(1e6, lambda candidate, seed: Failure("no such data")))


# Two runs of 10 s are done first, together. A search with 4 seeds takes at most (3 + 2) * 4 = 20 runs, with 2 seeds 10;
# it may take half of the runs that fit after them, and the comparison has 3 methods with 3 seeds at least.
@pytest.mark.parametrize(
    ("budget", "plan"),
    [
        (210, Plan(("none", "input", "smoothing"), 4)),  # 40 runs fit
        (209, Plan(("none", "input", "smoothing"), 2)),  # 39
        (110, Plan(("none", "input", "smoothing"), 2)),  # 20
        (109, Plan(("none", "input", "smoothing"), 0)),  # 19
        (45, Plan(("none", "input", "smoothing"), 0)),  # 7, and the first two are done
        (44, Plan(("none", "smoothing"), 0)),  # 6
        (30, Plan(("none", "smoothing"), 0)),  # 4, with the first ones six
    ],
)
def test_the_plan_fits_into_the_budget(budget: float, plan: Plan) -> None:
    kept: list[Plan] = []
    trainings = MadeUp(budget)
    run_course(METHODS, 3, trainings, lambda metrics: OBJECTIVE, None, kept.append)
    assert kept == [plan]


def test_what_the_budget_leaves_out_is_said() -> None:
    course = run(MadeUp(44))
    assert course.left_out == {"input mixup": "the budget was too small for it when the study was planned"}


def test_a_budget_for_no_study_is_refused_with_what_is_enough() -> None:
    # two methods with three seeds: six runs; the first one alone, the others in three pairs
    with pytest.raises(
        ValueError, match=r"a run takes about 10s, 2 at a time, .* has 6 runs\. Give budget=30s or more"
    ):
        run(MadeUp(29))


def test_the_comparison_ends_with_the_budget_after_whole_seeds() -> None:
    trainings = MadeUp(100)  # without search; 20 runs fit, so six seeds of three methods
    course = run(trainings, seeds=50, plan=Plan(("none", "input", "smoothing"), 0))
    assert course.seeds == [0, 1, 2, 3, 4, 5]
    assert trainings.left() >= 0


def test_a_larger_budget_goes_on() -> None:
    plan = Plan(("none", "input", "smoothing"), 0)
    trainings = MadeUp(60)
    before = run(trainings, seeds=50, plan=plan).seeds
    trainings.budget = 100
    assert len(run(trainings, seeds=50, plan=plan).seeds) > len(before)


def test_a_larger_budget_brings_in_what_did_not_fit() -> None:
    kept: list[Plan] = []
    trainings = MadeUp(44)
    small = run_course(METHODS, 3, trainings, lambda metrics: OBJECTIVE, None, kept.append)
    assert kept == [Plan(("none", "smoothing"), 0)]
    trainings.budget = 400
    run_course(METHODS, 3, trainings, lambda metrics: OBJECTIVE, small.plan, kept.append, may_grow=True)
    assert kept[1:] == [Plan(("none", "input", "smoothing"), 4)]
    trainings.budget = 401  # little is left to do, and nothing is planned anew
    run_course(METHODS, 3, trainings, lambda metrics: OBJECTIVE, kept[1], kept.append, may_grow=True)
    assert len(kept) == 2


def test_what_is_finished_is_read_again_with_a_budget_that_is_spent() -> None:
    plan = Plan(("none", "input", "smoothing"), 0)
    trainings = MadeUp(100)
    first = run(trainings, seeds=50, plan=plan)
    made = len(trainings.stages)
    trainings.budget = 0
    again = run(trainings, seeds=50, plan=plan)
    assert (again.seeds, again.results) == (first.seeds, first.results)
    assert len(trainings.stages) == made


DESCRIBED: dict[str, Any] = {
    "input": {"title": "input mixup", "words": ["mixup=input"], "strength": "alpha", "values": [1.0, 0.2]},
    "none": {"title": "no mixup", "words": ["mixup=none"]},
}


def test_methods_are_read_with_none_first() -> None:
    methods = methods_of(DESCRIBED, None)
    assert [method.name for method in methods] == ["none", "input"]
    last = methods[1].candidates[1]
    assert (last.name, last.title) == ("input-0.2", "input mixup (alpha 0.2)")
    assert last.words == ("mixup=input", "alpha=0.2")
    assert methods[0].candidates[0].words == ("mixup=none",)


@pytest.mark.parametrize(
    ("change", "only", "words"),
    [
        ({}, ["manifold"], "only names 'manifold', which is no method of the study. There are input, none;"),
        ({}, ["none"], "The study has no method beside 'none'"),
        ({"input": None}, None, "no method beside"),
        ({"none": None, "a": DESCRIBED["none"]}, None, "methods has no 'none', which all others are held against"),
        ({"a": {"title": "a"}}, None, "methods.a lacks 'words'"),
        ({"a": {"title": "a", "words": [], "alpha": 1}}, None, "methods.a has 'alpha', which is not known"),
        ({"a": {"title": "a", "words": [], "strength": "alpha"}}, None, "must have both strength and values"),
        ({"a": 3}, None, "methods.a must be {title: ..., words: [...]}, got 3."),
        (
            {"a": {"title": "a", "words": "mixup=patchup"}},
            None,
            "words must be a list, got 'mixup=patchup'. Write [mix",
        ),
        (
            {"a": {"title": "a", "words": [], "strength": "alpha", "values": 2.0}},
            None,
            "values must be a list, got 2.0",
        ),
        (
            {"a": {"title": "a", "words": [], "strength": "b", "values": [1, 2, 1]}},
            None,
            "must differ, got [1, 2, 1]: e",
        ),
        ({"a/b": {"title": "a", "words": []}}, None, "methods names 'a/b'"),
    ],
)
def test_descriptions_are_checked(change: dict[str, Any], only: list[str] | None, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        methods_of({**DESCRIBED, **change}, only)


def test_the_study_needs_none() -> None:
    with pytest.raises(ValueError, match="methods has no 'none'"):
        methods_of({"input": DESCRIBED["input"]}, None)
