"""What a second run of the step would change in the module, put back: attributes, containers, buffers, metrics."""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["Attributes", "Contents", "Effects"]

# Objects of these packages hold the trainer, loaders and the like, which are not touched.
_OF_OTHERS = re.compile(r"(lightning|torch|torchmetrics|transformers|builtins|types|functools|pytorch_lightning)\b")
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Effects:
    """What the partners' half changes, as the look saw it.

    Attributes:
        modules: The modules that run in it; their attributes may be set.
        contents: Attributes whose contents change: (module, name).
        lists: Attributes that are lists which grow.
        written: Attributes with tensors that are written into.
        tensors: Parameters and buffers that are written into.
        draws: Whether random numbers are drawn.
    """

    modules: tuple[nn.Module, ...] = ()
    contents: tuple[tuple[nn.Module, str], ...] = ()
    lists: tuple[tuple[nn.Module, str], ...] = ()
    written: tuple[tuple[nn.Module, str], ...] = ()
    tensors: tuple[Tensor, ...] = ()
    draws: bool = False

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Put back what the ``with`` block changes."""
        contents, values = Contents(lambda tensor: None), Contents(torch.clone)
        for module, name in self.contents:
            contents.add(vars(module).get(name))
        for module, name in self.written:
            values.add(vars(module).get(name))
        for tensor in self.tensors:
            values.add(tensor)
        lists = [(found, len(found)) for m, name in self.lists if isinstance(found := vars(m).get(name), list)]
        attributes = [Attributes(module) for module in self.modules]
        tensors = tuple(tensor for tensor, _ in values.tensors.values())
        # What is put back is what the own half has kept for its backward pass.
        with torch.autograd._unsafe_preserve_version_counter(tensors) if tensors else nullcontext():
            try:
                yield
            finally:
                for kept in attributes:
                    kept.restore()
                for grown, length in lists:
                    del grown[length:]
                contents.restore()
                values.restore()


class Attributes:
    """A module's attributes, not what they hold."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.values = dict(vars(module))
        self.tables = [(table, dict(table)) for name in _TABLES if (table := self.values.get(name))]

    def restore(self) -> None:
        """Set them to what they were."""
        for now, then in [(vars(self.module), self.values), *self.tables]:
            if not _is_same(now, then):
                now.clear()
                now.update(then)

    def have_changed(self) -> bool:
        """Whether one was set, made or deleted."""
        return any(not _is_same(now, then) for now, then in [(vars(self.module), self.values), *self.tables])


class Contents:
    """Tensors, arrays, generators and containers, with what they hold.

    Attributes:
        held: The tensors.

    Args:
        copied: Copies a tensor, or returns None if something else keeps what is in it.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor | None]) -> None:
        self.copied = copied
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.undo: list[Callable[[], Any]] = []
        self.held: list[Tensor] = []

    def add(self, value: Any) -> None:
        """Keep a value, and all that it holds."""
        if isinstance(value, Tensor):
            is_new = id(value) not in self.tensors and not torch.nn.parameter.is_lazy(value)
            self.held.append(value)
            if is_new and (copy := self.copied(value.detach())) is not None:
                self.tensors[id(value)] = (value, copy)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self.undo.append(lambda: value.set_state(state))
        elif isinstance(value, np.random.Generator):
            numbers = value.bit_generator.state
            self.undo.append(lambda: setattr(value.bit_generator, "state", numbers))
        elif isinstance(value, random.Random):
            python = value.getstate()
            self.undo.append(lambda: value.setstate(python))
        elif isinstance(value, np.ndarray):
            self.arrays[id(value)] = (value, value.copy())
        elif isinstance(value, Metric):  # in a plain container
            self._add_attributes(value)
        elif isinstance(value, tuple):
            for item in value:
                self.add(item)
        elif isinstance(value, (dict, list, set, collections.deque)) and id(value) not in self.containers:
            self.containers[id(value)] = (value, value.copy())
            for item in value.values() if isinstance(value, dict) else value:
                self.add(item)
        elif not _OF_OTHERS.match(type(value).__module__) and hasattr(value, "__dict__") and not callable(value):
            self._add_attributes(value)

    def _add_attributes(self, value: Any) -> None:
        if id(value) not in self.containers:
            self.containers[id(value)] = (vars(value), dict(vars(value)))
            for item in vars(value).values():
                self.add(item)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the contents back."""
        for undo in self.undo:
            undo()
        for container, contents in self.containers.values():
            if not _is_same(container, contents):
                container.clear()
                (container.extend if isinstance(container, (list, collections.deque)) else container.update)(contents)
        for array, numbers in self.arrays.values():
            np.copyto(array, numbers)
        for tensor, values in self.tensors.values():
            tensor.detach().copy_(values)

    def has_changed(self) -> bool:
        """Whether a container or an array holds something else now."""
        return any(not _is_same(*pair) for pair in self.containers.values()) or any(
            not np.array_equal(*pair, equal_nan=pair[0].dtype.kind in "fc") for pair in self.arrays.values()
        )

    def has_only_grown(self) -> bool:
        """Whether the change is that the list that was added first has got further items."""
        pairs = list(self.containers.values())
        now, then = pairs[0]
        return (
            isinstance(now, list)
            and len(now) > len(then)
            and _is_same(now[: len(then)], then)
            and all(_is_same(*pair) for pair in pairs[1:])
        )


def _is_same(container: Any, contents: Any) -> bool:
    if len(container) != len(contents):
        return False
    if isinstance(contents, dict):
        return all(name in container and container[name] is value for name, value in contents.items())
    if isinstance(contents, set):
        return bool(container == contents)
    return all(now is then for now, then in zip(container, contents, strict=True))
