"""Time that a study may take: how it is written, and how much of it is left."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["duration", "seconds_of"]

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_WAY_OUT = "Write 90m, 2h or 1h30m, say."


def seconds_of(budget: Any) -> float:
    """Return a budget in seconds.

    Args:
        budget: Text of numbers with units: s, m (or min), h, d. A number without a unit would be a guess.

    Raises:
        ValueError: If it is anything else, or not above 0.

    Example:
        >>> seconds_of("1h30m")
        5400.0
    """
    text = str(budget).replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if not parts or "".join(map("".join, parts)) != text or any(unit not in _UNITS for _, unit in parts):
        raise ValueError(f"budget must be a time with its unit, got {budget!r}. {_WAY_OUT}")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds > 0:
        raise ValueError(f"budget must be above 0, got {budget!r}. {_WAY_OUT}")
    return seconds


def duration(seconds: float) -> str:
    """Write seconds as ``seconds_of`` reads them, rounded up: ``1h05m``, ``12m``, ``2m40s``, ``40s``."""
    whole = max(1, math.ceil(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes}m{rest:02d}s" if rest else f"{minutes}m"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"
