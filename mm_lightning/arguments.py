"""What is said of an argument that cannot be: its name, what was expected, what came, and a way out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["check_count", "check_flag", "check_integer", "check_number", "is_flag", "no_such", "plain", "refusal"]


def check_number(name: str, value: Any, expected: str, is_one: Callable[[Any], bool], way_out: str) -> None:
    """Refuse what is no real number, Python's or numpy's, or not one of those that were expected.

    Args:
        name: Name of the argument.
        value: Its value.
        expected: What it must be.
        is_one: Whether a number is that.
        way_out: A sentence.

    Raises:
        TypeError: If ``value`` is no number; booleans are none.
        ValueError: If it is another number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refusal(name, value, expected, way_out)
    if not is_one(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}. {way_out}")


def check_integer(name: str, value: Any, expected: str, is_one: Callable[[Any], bool], way_out: str) -> None:
    """Refuse what :func:`check_number` refuses, and every number that is no integer with TypeError."""
    if not isinstance(value, Integral):
        raise refusal(name, value, expected, way_out)
    check_number(name, value, expected, is_one, way_out)


def check_count(name: str, value: Any, least: int, way_out: str) -> None:
    """Refuse what :func:`check_integer` refuses, and integers below ``least``."""
    check_integer(name, value, f"an integer >= {least}", lambda count: count >= least, way_out)


def check_flag(name: str, value: Any, way_out: str) -> None:
    """Raise TypeError unless ``value`` is True or False, of Python, numpy or torch."""
    if not is_flag(value):
        raise refusal(name, value, "True or False", way_out)


def is_flag(value: Any) -> bool:
    """Whether ``value`` is True or False, of Python, numpy or torch."""
    is_tensor = isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() == 0
    return isinstance(value, (bool, np.bool_)) or is_tensor


def refusal(name: str, value: Any, expected: str, way_out: str) -> TypeError:
    """The error of an argument of a wrong type."""
    return TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}. {way_out}")


def plain(value: Any) -> Any:
    """A mapping as a dict, arrays, sequences and what else can be gone through as a list, all else as it is.

    So that what OmegaConf or a generator holds can be gone through again, copied, pickled and saved.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    is_whole = isinstance(value, (str, bytes, type, nn.Module)) or callable(value)
    return list(value) if isinstance(value, Iterable) and not is_whole else value


def no_such(name: str, names: Iterable[str], what: str) -> str:
    """The sentence that there is no ``name`` among ``names``: with near ones, or else with all (at most ten)."""
    known = list(map(str, names))
    if near := difflib.get_close_matches(name, known, n=3):
        return f"There is no {what} {name!r}. Did you mean {' or '.join(map(repr, near))}?"
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return f"There is no {what} {name!r}. There are: {', '.join(map(repr, known[:10])) or 'none'}{more}."
