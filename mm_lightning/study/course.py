"""The course of a study within its budget: a first run, a search for each method's strength, a comparison.

The search sees validation data alone, and seeds that the comparison does not have. So the test of the runs that are
compared has chosen nothing, and the best of many strengths is not taken for better than it is. Where each seed draws a
split of its own, though, rows that a search's seed validated with are among those that others test with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from mm_lightning.study.budget import duration
from mm_lightning.study.candidates import NONE, Candidate, StudyMethod
from mm_lightning.study.halving import best_of, most_runs
from mm_lightning.study.statistics import Better

__all__ = ["Course", "Failure", "Objective", "Plan", "Trainings", "Trial", "run_course"]

Trial = tuple[Candidate, int]  # with a seed

FIRST_SEARCH_SEED = 1000  # the comparison has 0, 1, ...
SEARCH_SHARE = 0.5  # of the budget, at most
FEWEST_SEEDS = 3  # of a comparison; fewer make intervals that say nothing
_LEFT_OUT_FIRST = ("weight_decay", "label_smoothing", "input", "manifold")  # where the budget is small


class Failure(str):
    """Why a training failed."""


class Trainings(Protocol):
    """Trains, within the budget; finished trainings are not repeated."""

    at_once: int

    def left(self) -> float:
        """Return the seconds of the budget that are left."""

    def seconds_per_run(self) -> float:
        """Return the mean time of the trainings so far, those of an earlier call with them."""

    def are_finished(self, trials: Sequence[Trial]) -> bool:
        """Whether nothing is left to train of them."""

    def train(
        self, stage: str, trials: Sequence[Trial], is_limited: bool = False
    ) -> Mapping[Trial, Mapping[str, float] | Failure]:
        """Train what is not finished; with ``is_limited`` stop what takes longer than the budget has left."""


@dataclass(frozen=True)
class Objective:
    """What strengths are chosen by: key of a validation's metric, and its direction."""

    key: str
    better: Better


@dataclass(frozen=True)
class Plan:
    """What fits into the budget.

    Attributes:
        methods: Names of those that are compared.
        search_seeds: Seeds of the search for each candidate that goes on; 0 leaves the usual strengths.
    """

    methods: tuple[str, ...]
    search_seeds: int


@dataclass
class Course:
    """What a study has found.

    Attributes:
        objective: What strengths were chosen by.
        plan: What was done.
        chosen: The candidate of each method, ``none`` first.
        results: What each finished training of the comparison measured.
        left_out: Why a method is not compared, by title.
        searched: What the search measured: mean score and number of seeds of each candidate.
    """

    objective: Objective
    plan: Plan
    chosen: list[Candidate] = field(default_factory=list)
    results: dict[Trial, Mapping[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    searched: dict[Candidate, tuple[float, int]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Those that every method was compared with."""
        seeds = [{seed for one, seed in self.results if one == candidate} for candidate in self.chosen]
        return sorted(set.intersection(*seeds)) if seeds else []


def run_course(
    methods: Sequence[StudyMethod],
    seeds: int,
    trainings: Trainings,
    objective_of: Callable[[Mapping[str, float]], Objective],
    plan: Plan | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
    may_grow: bool = False,
) -> Course:
    """Run a study.

    Args:
        methods: The first one is ``none``.
        seeds: Most seeds of the comparison.
        trainings: Trains.
        objective_of: Finds what to choose by in the metrics of a training.
        plan: Of an earlier call with the same settings; None makes one.
        planned: Told of a new plan, before anything of it is done.
        may_grow: Whether the budget is larger than that of ``plan``, so that more may fit.

    Raises:
        RuntimeError: If the first training fails, or no method is left to compare.
        ValueError: If the budget is too small.
    """
    none, *others = methods
    # as many as run at a time: beside others each is slower than alone
    first = [(none.candidates[0], seed) for seed in range(min(trainings.at_once, seeds))]
    found = trainings.train("first runs", first, is_limited=True)
    for result in found.values():
        if isinstance(result, Failure):
            raise RuntimeError(f"The first run, which mixes nothing, has failed: {result}")
    results = {trial: result for trial, result in found.items() if not isinstance(result, Failure)}
    objective = objective_of(results[first[0]])
    new = plan_for(methods, seeds, trainings) if plan is None else plan
    if plan is not None and may_grow:
        with suppress(ValueError):  # what is left may fit less, when much of the study is done
            new = max(plan, plan_for(methods, seeds, trainings), key=lambda one: (len(one.methods), one.search_seeds))
    if new != plan:
        planned(new)
    plan = new
    course = Course(objective, plan)
    course.left_out = {
        method.title: "the budget was too small for it when the study was planned"
        for method in others
        if method.name not in plan.methods
    }
    wanted = [method for method in others if method.name in plan.methods]
    course.chosen = [none.candidates[0], *_search(wanted, course, trainings)]
    course.results.update(results)
    _compare(course, seeds, trainings)
    if not course.seeds:
        raise ValueError(
            f"The budget has ended before the comparison; a run takes about {duration(trainings.seconds_per_run())}. "
            "Give a larger one; the same command goes on from here."
        )
    return course


def plan_for(methods: Sequence[StudyMethod], seeds: int, trainings: Trainings) -> Plan:
    """Fit a study into what is left of the budget: fewer seeds to search with first, then no search, fewer methods.

    Raises:
        ValueError: If not even the last method and ``none`` fit in with the fewest seeds.
    """
    seconds = trainings.seconds_per_run()
    capacity = math.floor(trainings.left() * trainings.at_once / seconds)  # trainings
    fewest = min(seeds, FEWEST_SEEDS)
    done = min(trainings.at_once, fewest)  # of the first method
    for search_seeds in (4, 2):
        search = most_runs([method.candidates for method in methods], search_seeds)
        if search <= SEARCH_SHARE * capacity and search + len(methods) * fewest <= capacity:
            return Plan(tuple(method.name for method in methods), search_seeds)
    kept = list(methods)
    for name in (None, *_LEFT_OUT_FIRST):
        kept = [method for method in kept if method.name != name or len(kept) == 2]
        needed = len(kept) * fewest - done
        if needed <= capacity:
            return Plan(tuple(method.name for method in kept), 0)
    enough = seconds * math.ceil((needed + done) / trainings.at_once)
    raise ValueError(
        f"The budget is too small: a run takes about {duration(seconds)}, {trainings.at_once} at a time, and the "
        f"smallest study has {needed + done} runs. Give budget={duration(enough)} or more, or fewer max_epochs; "
        "what is finished is kept."
    )


def _search(methods: Sequence[StudyMethod], course: Course, trainings: Trainings) -> list[Candidate]:
    """Return the candidates that are compared, and say of the others why not."""
    objective, scores = course.objective, {}

    def train(trials: Sequence[Trial]) -> dict[Trial, float | None]:
        found = trainings.train("search", trials)
        for (candidate, _), result in found.items():
            if isinstance(result, Failure):
                course.left_out.setdefault(candidate.method.title, str(result))
        scores.update({trial: _score(result, objective.key) for trial, result in found.items()})
        return {trial: scores[trial] for trial in trials}

    if not course.plan.search_seeds:
        return [method.candidates[0] for method in methods]
    seeds = [FIRST_SEARCH_SEED + place for place in range(course.plan.search_seeds)]
    best = best_of([method.candidates for method in methods], seeds, objective.better, train)
    for candidate in dict.fromkeys(candidate for candidate, _ in scores):
        known = [score for (one, _), score in scores.items() if one == candidate and score is not None]
        if known:
            course.searched[candidate] = sum(known) / len(known), len(known)
    for method, found in zip(methods, best, strict=True):
        if found is None:
            course.left_out.setdefault(method.title, f"{objective.key} was not finite")
        else:
            course.left_out.pop(method.title, None)  # another strength has failed
    return [candidate for candidate in best if candidate is not None]


def _compare(course: Course, seeds: int, trainings: Trainings) -> None:
    """Train all that is compared with one seed after the other, as long as the budget lasts."""
    done = 0
    _check_left(course)
    while done < seeds:
        rounds = math.floor(trainings.left() * trainings.at_once / (trainings.seconds_per_run() * len(course.chosen)))
        # half of what seems to fit, so that the estimate is made again; what is finished already needs no time
        now = min(seeds - done, max(1, rounds // 2))
        trials = [(candidate, seed) for seed in range(done, done + now) for candidate in course.chosen]
        if rounds < 1 and not trainings.are_finished(trials):
            return
        for (candidate, seed), result in trainings.train("comparison", trials).items():
            if not isinstance(result, Failure):
                course.results[candidate, seed] = result
            elif candidate.method.name == NONE:
                raise RuntimeError(f"A run without mixing has failed, with seed {seed}: {result}")
            elif candidate in course.chosen:
                course.chosen.remove(candidate)
                course.left_out[candidate.method.title] = str(result)
        _check_left(course)
        done += now


def _check_left(course: Course) -> None:
    if len(course.chosen) < 2:
        reasons = "; ".join(f"{title}: {reason.rstrip('.')}" for title, reason in course.left_out.items())
        raise RuntimeError(f"No method is left to hold against no mixup. {reasons}.")


def _score(result: Mapping[str, float] | Failure, key: str) -> float | None:
    value: Any = None if isinstance(result, Failure) else result.get(key)
    return float(value) if value is not None and math.isfinite(value) else None
