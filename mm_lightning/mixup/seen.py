"""What a way of mixing may ask to see, by the names of its parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["BATCH", "HIDDEN", "LOGITS", "PARTNER", "TARGETS", "call_with", "seen_by", "vectors_of"]

TARGETS, BATCH, LOGITS, HIDDEN, PARTNER = "targets", "batch", "logits", "hidden", "partner"
_NAMES = (TARGETS, BATCH, LOGITS, HIDDEN, PARTNER)


def seen_by(way: Any, positional: int = 2) -> frozenset[str]:
    """Which of the names are parameters of ``way``, past those that it is always called with.

    A way whose parameters are not always of use says which are in an attribute ``asks_for``.
    """
    if (asked := getattr(way, "asks_for", None)) is not None:
        return frozenset(asked)
    try:
        return _parameters_of(way)[positional]
    except TypeError:  # it cannot be hashed
        return _parameters_of.__wrapped__(way)[positional]


@functools.lru_cache(maxsize=128)
def _parameters_of(way: Any) -> tuple[frozenset[str], ...]:
    """Those of the names that stand after the first 0, 1, 2 parameters."""
    try:
        names = list(inspect.signature(way).parameters)
    except (TypeError, ValueError):  # of a builtin
        names = []
    return tuple(frozenset(names[begin:]).intersection(_NAMES) for begin in range(3))


def call_with(way: Any, arguments: tuple[Any, ...], seen: Mapping[str, Any]) -> Any:
    """Call ``way`` with what it asks to see.

    Raises:
        ValueError: If that is not known.
    """
    wanted = seen_by(way, len(arguments))
    if missing := sorted(wanted - seen.keys()):
        raise ValueError(f"{way!r} asks for {' and '.join(missing)}, which must be given: draw(..., {missing[0]}=...).")
    return way(*arguments, **{name: seen[name] for name in wanted})


def vectors_of(hidden: Tensor) -> Tensor:
    """Hidden states (N, ...) as real vectors (N, D), between which distances are told; complex ones by both parts."""
    rows = hidden.detach()
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    return rows.reshape(len(rows), -1)
