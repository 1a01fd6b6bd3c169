"""Timing sides against each other: in turn, in one process, as ratios of neighbours.

A machine's speed drifts by more than what is measured here, so no time stands alone. In every round each side runs
once, in an order that turns round and rotates; the ratio of two sides is taken within the round, and its median and
quartiles over rounds are what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

__all__ = ["compare", "in_turn", "ratio", "seconds_of", "table"]

Run = Callable[[], float]


def seconds_of(call: Callable[[], object], seconds: float = 0.02) -> Run:
    """Make a run of a short call: repeated for about ``seconds``, it returns the mean seconds of one call.

    On a GPU the run ends when the device has finished.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    once = min(timer.timeit(1).mean for _ in range(3))
    number = max(1, round(seconds / once))
    return lambda: timer.timeit(number).mean


def wall_seconds(call: Callable[[], object]) -> float:
    """Seconds of one long call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def in_turn(sides: dict[str, Run], rounds: int, *, warmup: bool = True) -> dict[str, list[float]]:
    """Seconds of each side in each round; before them one round that does not count, where ``warmup``."""
    if warmup:
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(rounds):
        first = index // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order if index % 2 == 0 else reversed(order):  # no side always follows the same one
            seconds[name].append(sides[name]())
    return seconds


def ratio(ours: list[float], against: list[float]) -> dict[str, float]:
    """Median, quartiles and range of the ratios within rounds."""
    ratios = [one / other for one, other in zip(ours, against, strict=True)]
    lower, median, upper = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "min": min(ratios), "max": max(ratios)}


def compare(
    case: str,
    sides: dict[str, Run],
    against: str,
    rounds: int,
    *,
    targets: dict[str, float] | None = None,
    warmup: bool = True,
    **facts: Any,
) -> dict[str, Any]:
    """Run the sides in turn and return one row of a benchmark.

    Args:
        case: What is measured: a shape, a network.
        sides: The runs by name.
        against: The side that the others are divided by.
        rounds: Runs of each side.
        targets: For a side the largest ratio that is wanted; the smallest, where it is negative.
        warmup: Whether the first run of each side does not count.
        facts: Further numbers of the row: bytes, rows, layers.

    Returns:
        ``case``, ``against``, ``facts``, ``seconds`` (all runs of each side, and their median), ``ratios`` to
        ``against`` and ``targets``.
    """
    seconds = in_turn(sides, rounds, warmup=warmup)
    return {
        "case": case,
        "against": against,
        **facts,
        "seconds": {name: [float(f"{one:.5g}") for one in runs] for name, runs in seconds.items()},
        "median_seconds": {name: statistics.median(runs) for name, runs in seconds.items()},
        "ratios": {name: ratio(runs, seconds[against]) for name, runs in seconds.items() if name != against},
        "targets": targets or {},
    }


def is_met(row: dict[str, Any], side: str) -> bool | None:
    """Whether a side's median ratio is within its target; None without one."""
    target = row["targets"].get(side)
    if target is None:
        return None
    median = row["ratios"][side]["median"]
    return median <= target if target > 0 else median >= -target


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: a line for each side of each case."""
    lines = ["| case | side | median | times | quartiles | target |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        for index, (side, seconds) in enumerate(row["median_seconds"].items()):
            case = row["case"] if index == 0 else ""
            cells = [case, side, duration(seconds), *_ratio_cells(row, side)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds with a unit and three digits."""
    rounded = float(f"{seconds:.3g}")
    unit, scale = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if rounded >= pair[1]), ("µs", 1e-6))
    return f"{rounded / scale:.0f} {unit}" if rounded >= 1000 * scale else f"{rounded / scale:.3g} {unit}"


def _ratio_cells(row: dict[str, Any], side: str) -> list[str]:
    if side == row["against"]:
        return ["1", "", ""]
    found = row["ratios"][side]
    target = row["targets"].get(side)
    limit = "" if target is None else f"{'at most' if target > 0 else 'at least'} {abs(target):g}"
    verdict = {None: "", True: " ✓", False: " ✗"}[is_met(row, side)]
    digits = 3 if found["median"] < 2 else 2
    quartiles = f"{found['lower_quartile']:.{digits}f} to {found['upper_quartile']:.{digits}f}"
    return [f"{found['median']:.{digits}f}", quartiles, limit + verdict]
