"""What both halves of a step give, interpolated: losses, and what was logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mm_lightning.step.host import Logged

__all__ = ["between", "interpolated"]


def interpolated(own: list[Logged], partners: list[Logged], ratio: Any) -> list[Logged]:
    """Interpolate each value that both halves logged under a name."""
    waiting: dict[str, list[Any]] = {}
    for name, value, *_ in partners:
        waiting.setdefault(name, []).append(value)
    result = []
    for name, value, args, kwargs in own:
        values = waiting.get(name)
        if values:
            value = between(value, values.pop(0), ratio)
        result.append((name, value, args, kwargs))
    return result


def between(own: Any, partner: Any, ratio: Any) -> Any:
    """``ratio * own + (1 - ratio) * partner`` of numbers, and of those in dicts; else ``own``."""
    if isinstance(own, Mapping) and isinstance(partner, Mapping):
        return {key: between(value, partner.get(key, value), ratio) for key, value in own.items()}
    numbers = (Tensor, int, float)
    if not isinstance(own, numbers) or not isinstance(partner, numbers) or isinstance(own, bool):
        return own  # a metric, which has seen the batch's own targets
    if not isinstance(own, Tensor) and not isinstance(partner, Tensor) and own == partner:
        return own
    if isinstance(ratio, Tensor) and isinstance(own, Tensor) and own.is_floating_point():
        ratio = ratio.to(own.dtype)
    return ratio * own + (1 - ratio) * partner  # not lerp: of two infinite losses it is no number
