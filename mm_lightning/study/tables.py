"""A study's numbers as the report shows them: claims in words, tables of texts, places of dots. No markup."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mm_lightning.study.form import Cell, Experiment, Measure, Method, Run, Schedule, Verdict
from mm_lightning.study.statistics import Outcome
from mm_lightning.study.verdicts import is_better

__all__ = ["CHART_HEIGHT", "Claim", "Dot", "Row", "ShownCell", "Table", "claims", "count", "shown", "tables"]

CHART_HEIGHT = 54  # pixels
_MARGIN, _WIDTH, _GAP = 6, 72, 10  # pixels: above and below the dots, all of them side by side, two of them at most
_MISSING = "–"


@dataclass(frozen=True)
class Claim:
    """A verdict in words; ``agrees`` is None where the reference schedule was not run or has nothing to agree with."""

    outcome: Outcome
    verdict: str
    text: str
    method: str
    against: str
    seeds: str
    needed: str
    difference: str
    unit: str
    agrees: bool | None


@dataclass(frozen=True)
class Dot:
    """A seed in a chart: place, in pixels right of the chart's middle and below its top, and what a pointer reads."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class ShownCell:
    """A cell of a table; ``note`` tells of seeds without a value, ``mean_y`` is the mean's place in the chart."""

    text: str
    note: str
    is_best: bool
    dots: list[Dot]
    mean_y: float | None


@dataclass(frozen=True)
class Row:
    """A measure, its cells by method, the ends of their charts' common scale, and the first method's mean on it."""

    measure: Measure
    cells: list[ShownCell]
    low: str
    high: str
    first_y: float | None


@dataclass(frozen=True)
class Table:
    """All measures and methods under one schedule; ``has_charts`` if a method has more than one seed."""

    schedule: Schedule
    seeds: str
    has_charts: bool
    methods: list[Method]
    rows: list[Row]


def claims(experiment: Experiment) -> list[Claim]:
    """Put the verdicts of an experiment in words.

    Raises:
        ValueError: If a verdict names what the experiment does not have, or a measure without a direction.
    """
    _check_names(experiment)
    titles = {method["name"]: method["title"] for method in experiment["methods"]}
    measures = {measure["key"]: measure for measure in experiment["measures"]}
    return [_claim(verdict, measures[verdict["key"]], titles) for verdict in experiment["verdicts"]]


def tables(experiment: Experiment) -> list[Table]:
    """Lay out a table for each schedule that has runs, in the order of the schedules.

    A cell is ``mean ± sd``. In a row, the method is marked that is better than every other, by its paired differences.
    In a chart, a dot's height is its value, on a scale that all charts of a row share, and seeds go from left to right
    in the order of the runs. Values that look all the same as displayed are drawn at the same height.

    Raises:
        ValueError: If a run or a cell names what the experiment does not have.
    """
    _check_names(experiment)
    runs = {
        schedule["name"]: [run for run in experiment["runs"] if run["schedule"] == schedule["name"]]
        for schedule in experiment["schedules"]
    }
    return [
        _table(experiment, schedule, runs[schedule["name"]])
        for schedule in experiment["schedules"]
        if runs[schedule["name"]]
    ]


def shown(value: float | None, measure: Measure, sign: str = "-") -> str:
    """Write a raw value as its measure is displayed, with a true minus; None and what is not finite are a dash.

    Args:
        value: In raw units.
        measure: Gives factor and digits.
        sign: ``"+"`` to have a plus before positive numbers.
    """
    if value is None or not math.isfinite(value):
        return _MISSING
    # + 0.0: a negative number that rounds to zero has no sign
    number = _rounded(value, measure) + 0.0
    return f"{number:{sign if number else ''},.{measure['digits']}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """Write a number with its noun, as in ``1 seed`` and ``5 seeds``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _claim(verdict: Verdict, measure: Measure, titles: Mapping[str, str]) -> Claim:
    if measure["better"] is None:
        raise ValueError(f"A verdict judges {measure['key']!r}, a measure whose 'better' is None: say which way is.")
    difference, half_width = shown(verdict["difference"], measure, "+"), verdict["half_width"]
    unit = {"%": "pp"}.get(measure["unit"], measure["unit"])
    left_out = f" (without {', '.join(map(str, verdict['left_out']))})" if verdict["left_out"] else ""
    needed = str(verdict["seeds_needed"] or ("more than 1,000" if half_width else _MISSING))
    return Claim(
        outcome=verdict["verdict"],
        verdict=_words(verdict, measure, unit),
        text=f"{measure['better']} {measure['title']}",
        method=titles[verdict["method"]],
        against=titles[verdict["against"]],
        seeds=f"{verdict['seeds']}{left_out}",
        needed=needed,
        difference=difference if half_width is None else f"{difference} ± {shown(half_width, measure)}",
        unit="" if difference == _MISSING else unit,
        agrees=verdict["reference_agrees"],
    )


def _words(verdict: Verdict, measure: Measure, unit: str) -> str:
    if verdict["verdict"] == "no difference" and verdict["margin"]:
        return f"no difference larger than {verdict['margin'] * measure['factor']:g} {unit}".rstrip()
    return "one seed tells nothing" if verdict["seeds"] == 1 else verdict["verdict"]


def _table(experiment: Experiment, schedule: Schedule, runs: list[Run]) -> Table:
    seeds = Counter(run["method"] for run in runs)
    fewest, most = min(seeds.values()), max(seeds.values())
    methods = [method for method in experiment["methods"] if method["name"] in seeds]
    cells = {
        (cell["method"], cell["key"]): cell for cell in experiment["cells"] if cell["schedule"] == schedule["name"]
    }
    rows = [
        _row(
            measure,
            [(cells.get((method["name"], measure["key"])), _runs_of(method, runs)) for method in methods],
            _best(measure, [method["name"] for method in methods], runs),
        )
        for measure in experiment["measures"]
    ]
    return Table(
        schedule=schedule,
        seeds=count(most, "seed") if fewest == most else f"{fewest} to {count(most, 'seed')}",
        has_charts=most > 1,
        methods=methods,
        rows=rows,
    )


def _runs_of(method: Method, runs: list[Run]) -> list[Run]:
    return [run for run in runs if run["method"] == method["name"]]


def _row(measure: Measure, columns: list[tuple[Cell | None, list[Run]]], best: str | None) -> Row:
    means = [_finite(cell["mean"]) if cell else None for cell, _ in columns]
    values = [_finite(run["metrics"].get(measure["key"])) for _, runs in columns for run in runs]
    place = _scale(means + values, measure)
    present = [value for value in values if value is not None]
    return Row(
        measure=measure,
        cells=[
            _shown_cell(measure, cell, runs, place, is_best=best is not None and runs[0]["method"] == best)
            for cell, runs in columns
        ],
        low=shown(min(present, default=None), measure),
        high=shown(max(present, default=None), measure),
        first_y=None if means[0] is None else place(means[0]),
    )


def _shown_cell(
    measure: Measure, cell: Cell | None, runs: list[Run], place: Callable[[float], float], is_best: bool
) -> ShownCell:
    mean, sd = (None, None) if cell is None else (_finite(cell["mean"]), cell["sd"])
    values = [_finite(run["metrics"].get(measure["key"])) for run in runs]
    number = sum(value is not None for value in values)
    gap = min(_GAP, _WIDTH / len(runs))
    dots = [
        Dot(
            x=round((position - (len(runs) - 1) / 2) * gap, 1),
            y=place(value),
            text=f"seed {run['seed']}: {shown(value, measure)} {measure['unit']}".rstrip(),
        )
        for position, (run, value) in enumerate(zip(runs, values, strict=True))
        if value is not None
    ]
    return ShownCell(
        text=shown(mean, measure) + (f" ± {shown(sd, measure)}" if mean is not None and sd is not None else ""),
        note=f"{number} of {count(len(runs), 'seed')}" if 0 < number < len(runs) else "",
        is_best=is_best,
        dots=dots,
        mean_y=None if mean is None else place(mean),
    )


def _scale(values: Iterable[float | None], measure: Measure) -> Callable[[float], float]:
    present = [value for value in values if value is not None]
    low, high = min(present, default=0.0), max(present, default=0.0)
    is_flat = _rounded(low, measure) == _rounded(high, measure)

    def place(value: float) -> float:
        share = 0.5 if is_flat else (high - value) / (high - low)
        return round(_MARGIN + share * (CHART_HEIGHT - 2 * _MARGIN), 1)

    return place


def _best(measure: Measure, methods: list[str], runs: list[Run]) -> str | None:
    """Name the method that is better than every other one, if there are others."""
    schedule = runs[0]["schedule"]
    return next(
        (
            method
            for method in methods
            if len(methods) > 1
            and all(is_better(runs, measure, method, other, schedule) for other in methods if other != method)
        ),
        None,
    )


def _rounded(value: float, measure: Measure) -> float:
    return round(value * measure["factor"], measure["digits"])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _check_names(experiment: Experiment) -> None:
    methods = [method["name"] for method in experiment["methods"]]
    known = {
        "method": methods,
        "against": methods,
        "schedule": [schedule["name"] for schedule in experiment["schedules"]],
        "key": [measure["key"] for measure in experiment["measures"]],
    }
    entries: list[Mapping[str, object]] = [*experiment["runs"], *experiment["cells"], *experiment["verdicts"]]
    for entry in entries:
        for field, names in known.items():
            if field in entry and entry[field] not in names:
                raise ValueError(
                    f"Experiment {experiment['name']!r} has no {field} {entry[field]!r}. It has {', '.join(names)}."
                )
