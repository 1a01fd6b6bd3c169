from __future__ import annotations

import importlib
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench.timing")


def _sides(names: str) -> tuple[dict[str, Any], list[str]]:
    """Sides that return 0, 1, 2, ... in the order in which they are called, and that order."""
    called: list[str] = []
    number = count()

    def side(name: str) -> Any:
        def run() -> float:
            called.append(name)
            return float(next(number))

        return run

    return {name: side(name) for name in names}, called


def test_order_turns_round_and_rotates(timing: Any) -> None:
    sides, called = _sides("abc")
    seconds = timing.in_turn(sides, 4)
    assert "".join(called) == "abc" + "abc" + "cba" + "bca" + "acb"  # the first round does not count
    assert seconds == {"a": [3, 8, 11, 12], "b": [4, 7, 9, 14], "c": [5, 6, 10, 13]}


def test_without_warmup_the_first_round_counts(timing: Any) -> None:
    sides, called = _sides("ab")
    assert timing.in_turn(sides, 2, warmup=False) == {"a": [0, 3], "b": [1, 2]}
    assert "".join(called) == "abba"


def test_ratio_is_taken_within_rounds(timing: Any) -> None:
    # 2, 6 and 3; the medians of the sides, 12 and 2, would say 6
    assert timing.ratio([2.0, 12.0, 30.0], [1.0, 2.0, 10.0]) == {
        "median": 3.0,
        "lower_quartile": 2.5,
        "upper_quartile": 4.5,
        "min": 2.0,
        "max": 6.0,
    }


def test_ratio_needs_as_many_runs_of_both_sides(timing: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio([1.0, 2.0], [1.0])


def test_compare_returns_a_row(timing: Any) -> None:
    ours, base = iter([9.0, 2.0, 12.0, 30.0]), iter([9.0, 1.0, 2.0, 10.000049])
    sides = {"base": lambda: next(base), "ours": lambda: next(ours)}
    row = timing.compare("8 MB", sides, "base", 3, targets={"ours": 1.5}, bytes=8)
    ratios = row.pop("ratios")
    assert row == {
        "case": "8 MB",
        "against": "base",
        "bytes": 8,
        "seconds": {"base": [1.0, 2.0, 10.0], "ours": [2.0, 12.0, 30.0]},  # five digits are kept
        "median_seconds": {"base": 2.0, "ours": 12.0},
        "targets": {"ours": 1.5},
    }
    assert list(ratios) == ["ours"]
    assert ratios["ours"]["median"] == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize(
    ("median", "target", "met"),
    [(1.2, 1.25, True), (1.25, 1.25, True), (1.3, 1.25, False), (2.5, -2.0, True), (2.0, -2.0, True), (1.9, -2, False)],
)
def test_target_is_a_ceiling_or_where_negative_a_floor(timing: Any, median: float, target: float, met: bool) -> None:
    row = {"targets": {"ours": target}, "ratios": {"ours": {"median": median}}}
    assert timing.is_met(row, "ours") is met


def test_side_without_target_is_neither_met_nor_missed(timing: Any) -> None:
    assert timing.is_met({"targets": {"other": 1.0}, "ratios": {"ours": {"median": 1.0}}}, "ours") is None


def test_table_has_a_line_for_each_side(timing: Any) -> None:
    def quartiles(median: float, lower: float, upper: float) -> dict[str, float]:
        return {"median": median, "lower_quartile": lower, "upper_quartile": upper}

    row = {
        "case": "8 MB",
        "against": "copies",
        "median_seconds": {"copies": 0.004, "mix": 0.0045678, "textbook": 0.01, "lerp": 0.009},
        "ratios": {
            "mix": quartiles(1.14195, 1.1, 1.25),
            "textbook": quartiles(2.5, 2.4, 2.655),
            "lerp": quartiles(1.9, 1.8, 2.1),
        },
        "targets": {"mix": 1.25, "textbook": -3.0},
    }
    assert timing.table([row]).splitlines() == [
        "| case | side | median | times | quartiles | target |",
        "| --- | --- | ---: | ---: | ---: | --- |",
        "| 8 MB | copies | 4 ms | 1 |  |  |",
        "|  | mix | 4.57 ms | 1.142 | 1.100 to 1.250 | at most 1.25 ✓ |",
        "|  | textbook | 10 ms | 2.50 | 2.40 to 2.65 | at least 3 ✗ |",
        "|  | lerp | 9 ms | 1.900 | 1.800 to 2.100 |  |",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(83.21, "83.2 s"), (1.0, "1 s"), (0.0123, "12.3 ms"), (1e-3, "1 ms"), (4.567e-5, "45.7 µs"), (2e-9, "0.002 µs")],
)
def test_duration_has_three_digits_and_a_unit(timing: Any, seconds: float, text: str) -> None:
    assert timing.duration(seconds) == text


def test_short_call_is_repeated_for_about_the_given_time(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    means = iter([0.009, 0.004, 0.005, 0.0041])

    def timeit(number: int) -> SimpleNamespace:
        numbers.append(number)
        return SimpleNamespace(mean=next(means))

    monkeypatch.setattr(timing, "Timer", lambda *args, **settings: SimpleNamespace(timeit=timeit))
    run = timing.seconds_of(lambda: None, seconds=0.02)
    assert run() == 0.0041
    assert numbers == [1, 1, 1, 5]  # 0.02 s of the fastest, 0.004 s


def test_short_call_is_the_one_that_is_timed(timing: Any) -> None:
    called: list[int] = []
    run = timing.seconds_of(lambda: called.append(1), seconds=0.0)
    before = len(called)
    assert run() > 0
    assert len(called) > before


def test_long_call_is_timed_once(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = timing.wall_seconds(lambda: called.append(1))
    monkeypatch.undo()
    assert (seconds, called) == (2.5, [1])
