"""Times as they are typed and shown."""

from __future__ import annotations

import pytest

from mm_lightning.study.budget import duration, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200.0),
        ("90m", 5400.0),
        ("1h30m", 5400.0),
        ("45s", 45.0),
        ("1.5h", 5400.0),
        ("20min", 1200.0),
        ("1d", 86400),
    ],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", [3600, "3600", "2 weeks", "h", "", None, "2h and more", "-1h", "1h-30m"])
def test_what_is_no_time_is_refused(text: object) -> None:
    with pytest.raises(
        ValueError, match=r"^budget must be a time with its unit, got .* Write 90m, 2h or 1h30m, say\.$"
    ):
        seconds_of(text)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget must be above 0, got '0m'"):
        seconds_of("0m")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1s"), (59.5, "1m"), (61, "1m01s"), (599, "9m59s"), (601, "11m"), (3601, "1h01m")]
)
def test_times_are_rounded_up(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert seconds_of(duration(seconds)) >= seconds
