"""Tensors inside of what modules return: tuples, dicts, dataclasses and the like."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["map_tensors", "tensors_in"]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A copy of ``tree`` with ``function`` applied to each of its tensors."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if _is_dataclass(leaf):
            twin = copy.copy(leaf)
            for name in _fields(leaf):
                object.__setattr__(twin, name, map_tensors(function, getattr(leaf, name)))
            return twin
        return leaf

    return function(tree) if isinstance(tree, Tensor) else tree_map(apply, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of ``tree``, in the order of :func:`map_tensors`."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif _is_dataclass(leaf):
            found.extend(tensor for name in _fields(leaf) for tensor in tensors_in(getattr(leaf, name)))
    return found


def _is_dataclass(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _fields(leaf: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)]
