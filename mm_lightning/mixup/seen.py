"""What a way of mixing may ask to see, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = [
    "BATCH",
    "HIDDEN",
    "LOGITS",
    "PARTNER",
    "TARGETS",
    "call_with",
    "check_asks",
    "precise",
    "seen_by",
    "vectors_of",
]

TARGETS, BATCH, LOGITS, HIDDEN, PARTNER = "targets", "batch", "logits", "hidden", "partner"
_NAMES = (TARGETS, BATCH, LOGITS, HIDDEN, PARTNER)


def seen_by(way: Any, positional: int = 2) -> frozenset[str]:
    """Which of the names are parameters of ``way``, past those that it is always called with.

    A way whose parameters are not always of use says which are in an attribute ``asks_for``.
    """
    if (asked := getattr(way, "asks_for", None)) is not None:
        return frozenset(asked)
    return frozenset(_parameters_of(way)[positional:]).intersection(_NAMES)


def check_asks(name: str, way: Any, positional: int = 2) -> None:
    """Raise TypeError if ``way`` has a parameter that must be given and is not one of the names."""
    try:
        parameters = list(inspect.signature(way).parameters.values())
    except (TypeError, ValueError):  # of a builtin
        return
    for parameter in parameters[positional:]:
        is_needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if is_needed and parameter.name not in _NAMES:
            raise TypeError(
                f"{name} asks for {parameter.name!r}, which nothing hands over, got {way!r}. It may ask for "
                f"{', '.join(map(repr, _NAMES))}."
            )


# By function or class, and weakly: the way itself may be a method of a network.
_known: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def _parameters_of(way: Any) -> tuple[str, ...]:
    """Names of the parameters with which ``way`` is called."""
    key = getattr(way, "__func__", way if inspect.isfunction(way) else type(way))
    if key in _known:
        return _known[key]
    try:
        names = tuple(inspect.signature(way).parameters)
    except (TypeError, ValueError):  # of a builtin
        names = ()
    if inspect.isfunction(way) or inspect.ismethod(way) or ("__call__" in vars(key) and not isinstance(way, partial)):
        _known[key] = names
    return names


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


def precise(rows: Tensor) -> Tensor:
    """Numbers in float64, or float32 on devices that know no other."""
    return rows.float() if rows.device.type == "mps" else rows.double()
