"""Numbers that a benchmark returns beside its rows, as Markdown: each with the unit that its key ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.timing import duration
from mm_lightning.command.run_folder import environment

__all__ = ["cells", "flat_tables", "number_lines", "quantity"]

_UNITS: dict[str, Callable[[float], str]] = {
    "bytes": lambda value: _bytes(value),
    "seconds": duration,
    "ms": lambda value: f"{_digits(value)} ms",
    "us": lambda value: f"{_digits(value)} µs",
}
_NAMES = {"gflops": "GFLOP/s", "flops": "FLOP"}


def cells(*texts: str) -> str:
    """Return one line of a Markdown table."""
    escaped = (text.replace("|", "\\|").replace("\n", " ") for text in texts)
    return f"| {' | '.join(escaped)} |"


def flat_tables(result: Mapping[str, Any]) -> list[str]:
    """Return a titled table for each list of dicts, or dict, that a benchmark gives beside ``rows``."""
    found = []
    for key, value in _extras(result).items():
        rows = [value] if isinstance(value, dict) else value
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            found.append(f"{_title(key)}:\n\n{_flat_table(rows)}")
    return found


def number_lines(result: Mapping[str, Any]) -> list[str]:
    """Return a list item for each single number or text that a benchmark gives beside ``rows``."""
    singles = {key: value for key, value in _extras(result).items() if not isinstance(value, (dict, list))}
    return [f"- {_title(key)}: {quantity(key, value)}" for key, value in singles.items()]


def quantity(key: str, value: Any) -> str:
    """Return a value with three digits and the unit its key ends in: ``_bytes``, ``_seconds``, ``_ms`` or ``_us``."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    return _UNITS.get(key.rpartition("_")[2], _digits)(value)


def _extras(result: Mapping[str, Any]) -> dict[str, Any]:
    known = {"benchmark", "what", "command", "rows", "notes", "threads", "processor", *environment()}
    return {key: value for key, value in result.items() if key not in known}


def _flat_table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in keys]
    lines = [cells(*map(_words, keys)), cells(*("---:" if right else "---" for right in numeric))]
    lines += [cells(*(quantity(key, row.get(key)) for key in keys)) for row in rows]
    return "\n".join(lines)


def _title(key: str) -> str:
    words = _words(key)
    return words[0].upper() + words[1:]


def _words(key: str) -> str:
    stem, _, unit = key.rpartition("_")
    text = stem if stem and unit in _UNITS else key
    return " ".join(_NAMES.get(word, word) for word in text.split("_"))


def _bytes(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * scale:  # what rounds to 1000 takes the next unit
            return f"{_digits(value / scale)} {unit}"
    return f"{_digits(value)} B"


def _digits(value: float) -> str:
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):,.10g}"
