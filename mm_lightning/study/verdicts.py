"""What the runs of a study say: means over seeds, and a verdict on each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from mm_lightning.study.form import Cell, Measure, Run, Verdict
from mm_lightning.study.statistics import Outcome, compare_paired


def cells(runs: Sequence[Run], measures: Sequence[Measure]) -> list[Cell]:
    """Sum up every measure of every method and schedule over its seeds, in the order in which the runs name them."""
    groups = dict.fromkeys((run["schedule"], run["method"]) for run in runs)
    found = []
    for schedule, method in groups:
        own = [run for run in runs if (run["schedule"], run["method"]) == (schedule, method)]
        for measure in measures:
            values = [_value(run, measure["key"]) for run in own]
            known = [value for value in values if value is not None]
            found.append(
                Cell(
                    schedule=schedule,
                    method=method,
                    key=measure["key"],
                    mean=mean(known) if known else None,
                    sd=stdev(known) if len(known) > 1 else None,
                    values=values,
                )
            )
    return found


def verdict(runs: Sequence[Run], measure: Measure, method: str, against: str, schedules: Sequence[str]) -> Verdict:
    """Judge the claim that one method is better than another, by the differences of runs with the same seed.

    Where a run of such a pair has no value, as after a loss that is NaN, nothing is ``better``, ``worse`` or no
    different: a method must not gain by the seeds in which it failed.

    Args:
        runs: Of both methods.
        measure: Has a direction.
        method: The one claimed to be better.
        against: The one it is compared with.
        schedules: The one that is judged, then those that should agree.

    Returns:
        The verdict. The other schedules agree where all their differences have its sign.

    Raises:
        ValueError: If the measure has no direction, or no seed of the first schedule has both methods.
    """
    if measure["better"] is None:
        raise ValueError(f"{measure['key']!r} has no direction, so nothing can be better in it.")
    first, *others = (_differences(runs, measure["key"], method, against, schedule) for schedule in schedules)
    if not first:
        raise ValueError(
            f"No seed of schedule {schedules[0]!r} has both {method!r} and {against!r}. Train both with the same seeds."
        )
    known = [difference for difference in first.values() if difference is not None]
    found = compare_paired(known, measure["better"], measure["margin"]) if known else None
    outcome: Outcome = found.outcome if found and len(known) == len(first) else "not distinguishable"
    return Verdict(
        key=measure["key"],
        method=method,
        against=against,
        seeds=len(known),
        left_out=sorted(_seeds(runs, method, schedules[0]) ^ _seeds(runs, against, schedules[0])),
        difference=found.difference if found else None,
        half_width=found.half_width if found else None,
        seeds_needed=found.seeds_needed if found else None,
        margin=measure["margin"],
        reference_agrees=_agree(outcome, found.difference, others) if found else None,
        verdict=outcome,
    )


def is_better(runs: Sequence[Run], measure: Measure, method: str, against: str, schedule: str) -> bool:
    """Tell whether a method's verdict against another is ``better``; no without a direction or a seed of both."""
    return (
        measure["better"] is not None
        and not _seeds(runs, method, schedule).isdisjoint(_seeds(runs, against, schedule))
        and verdict(runs, measure, method, against, [schedule])["verdict"] == "better"
    )


def _seeds(runs: Sequence[Run], method: str, schedule: str) -> set[int]:
    return {run["seed"] for run in runs if (run["method"], run["schedule"]) == (method, schedule)}


def _differences(runs: Sequence[Run], key: str, method: str, against: str, schedule: str) -> dict[int, float | None]:
    """Method - against of each seed that has both; None where either has no value."""
    of = {(run["method"], run["seed"]): _value(run, key) for run in runs if run["schedule"] == schedule}
    pairs = {
        seed: (of[method, seed], of[against, seed]) for name, seed in of if name == method and (against, seed) in of
    }
    return {seed: None if a is None or b is None else a - b for seed, (a, b) in pairs.items()}


def _agree(outcome: Outcome, difference: float, others: Sequence[Mapping[int, float | None]]) -> bool | None:
    theirs = [other for schedule in others for other in schedule.values()]
    if outcome not in ("better", "worse") or not theirs or None in theirs:
        return None
    return all(other * difference > 0 for other in theirs if other is not None)


def _value(run: Run, key: str) -> float | None:
    value = run["metrics"].get(key)
    return value if value is not None and math.isfinite(value) else None
