"""What the runs of a study say: means over seeds, and a verdict on each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Literal

from mm_lightning.study.form import Cell, Measure, Run, Verdict


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
    """Judge the claim that one method is better than another, seed by seed.

    It ``holds`` where ``method`` is better in every seed of the first schedule, ``fails`` where it is better in none,
    and is ``mixed`` otherwise. A seed in which either has no value counts as one in which it is not better.

    Args:
        runs: Of both methods.
        measure: Has a direction.
        method: The one claimed to be better.
        against: The one it is compared with.
        schedules: The one that is judged, then those that should agree.

    Returns:
        The verdict. The other schedules agree where their seeds say the same; of a mixed one nothing is asked.

    Raises:
        ValueError: If the measure has no direction, or no seed of the first schedule has both methods.
    """
    if measure["better"] is None:
        raise ValueError(f"{measure['key']!r} has no direction, so nothing can be better in it.")
    first, *others = ({**_differences(runs, measure["key"], method, against, schedule)} for schedule in schedules)
    if not first:
        raise ValueError(f"No seed of schedule {schedules[0]!r} has both {method!r} and {against!r}.")
    sign = 1 if measure["better"] == "higher" else -1
    known = [difference for difference in first.values() if difference is not None]
    better_in = sum(sign * difference > 0 for difference in known)
    outcome: Literal["holds", "mixed", "fails"] = (
        "holds" if better_in == len(first) else "mixed" if better_in else "fails"
    )
    return Verdict(
        key=measure["key"],
        method=method,
        against=against,
        better_in=better_in,
        seeds=len(first),
        difference=mean(known) if known else None,
        sd=stdev(known) if len(known) > 1 else None,
        reference_agrees=_agree(outcome, sign, [other for other in others if other]),
        verdict=outcome,
    )


def _differences(runs: Sequence[Run], key: str, method: str, against: str, schedule: str) -> Mapping[int, float | None]:
    """Method - against of each seed that has both; None where either has no value."""
    of = {(run["method"], run["seed"]): _value(run, key) for run in runs if run["schedule"] == schedule}
    pairs = {
        seed: (of[method, seed], of[against, seed]) for name, seed in of if name == method and (against, seed) in of
    }
    return {seed: None if a is None or b is None else a - b for seed, (a, b) in pairs.items()}


def _agree(outcome: str, sign: int, others: Sequence[Mapping[int, float | None]]) -> bool | None:
    differences = [difference for other in others for difference in other.values()]
    if outcome == "mixed" or not differences or None in differences:
        return None
    return all((sign * difference > 0) == (outcome == "holds") for difference in differences if difference is not None)


def _value(run: Run, key: str) -> float | None:
    value = run["metrics"].get(key)
    return value if value is not None and math.isfinite(value) else None
