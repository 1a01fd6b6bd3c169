"""What a second run of the step would change in the module, put back: attributes, containers, buffers, metrics."""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["Attributes", "Contents", "Effects", "Name", "Started", "held_by", "merged"]

# Objects of these packages hold the trainer, loaders and the like, which are not touched.
_OF_OTHERS = re.compile(r"(lightning|torch|torchmetrics|transformers|builtins|types|functools|pytorch_lightning)\b")
_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, str, type(None))
_NOT_OF_THE_USER = (*_TABLES, "_trainer", "_fabric")


Name = tuple[nn.Module, str, str]
"""A module, a table of it (empty for its attributes), and a name there."""


@dataclass(eq=False)
class Effects:
    """What a step changes in the module outside of the calls that are taken over.

    The look says what it saw. What a later step changes besides is learned, from the moment on when it does.

    Attributes:
        modules: The modules that run in the partners' half, or might; their attributes may be set.
        containers: Attributes whose contents change otherwise than by a list's growing: (module, name), and whether
            tensors in them are written into.
        tensors: Buffers, attributes and parameters that are not trained, which are written into.
        draws: Whether random numbers are drawn.
    """

    modules: Sequence[nn.Module] = ()
    containers: Sequence[tuple[nn.Module, str, bool]] = ()
    tensors: Sequence[Name] = ()
    draws: bool = False

    def start(self) -> Started:
        """Keep what is there when the step begins."""
        return Started(self)


def merged(one: Effects | None, other: Effects) -> Effects:
    """What either was seen to change."""
    if one is None:
        return other
    is_written = {at[:2]: at[2] for at in one.containers}
    for module, name, written in other.containers:
        is_written[module, name] = is_written.get((module, name), False) or written
    containers = [(module, name, written) for (module, name), written in is_written.items()]
    return Effects(other.modules, containers, list(dict.fromkeys([*one.tensors, *other.tensors])))


def held_by(module: nn.Module) -> list[tuple[str, Any]]:
    """The user's attributes of a module that hold something."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _NOT_OF_THE_USER and not name.endswith("hooks") and not isinstance(value, _PLAIN)
    ]


class Started:
    """The state at the beginning of a step, in which the partners' half begins as well."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.attributes = [Attributes(module) for module in effects.modules]
        self.contents = [(at, Contents(vars(at[0]).get(at[1]))) for at in effects.containers]
        for (_, _, is_written), contents in self.contents:
            if is_written:
                contents.keep_tensors(lambda tensor: tensor.detach().clone())
        self.lists = [
            (value, len(value)) for kept in self.attributes for value in kept.values.values() if type(value) is list
        ]
        found = [(name, _get(name)) for name in effects.tensors]
        self.values = [(name, tensor, tensor.detach().clone()) for name, tensor in found if tensor is not None]
        self.versions = [(name, tensor, tensor._version) for kept in self.attributes for name, tensor in kept.tensors()]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Go back to the beginning of the step, and in the end to where its own half has ended."""
        self.learn()
        now: list[Attributes | Contents] = [Attributes(kept.module) for kept in self.attributes]
        now += [Contents(vars(module).get(name)) for module, name, _ in self.effects.containers]
        tails = [(grown, length, grown[length:]) for grown, length in self.lists]
        then: list[Attributes | Contents] = [*self.attributes, *(contents for _, contents in self.contents)]
        for kept in then:
            kept.restore()
        for grown, length, _ in tails:
            del grown[length:]
        # Other tensors take the place of those that are written into, because the own half's graph may hold these.
        for name, _, values in self.values:
            _set(name, values.clone())
        try:
            yield
        finally:
            for kept in now:
                kept.restore()
            for grown, length, tail in tails:
                grown[length:] = tail

    def learn(self) -> None:
        """What was written into in the own half and was never before: begin in the partners' half where it is now."""
        known = {id(tensor) for _, tensor, _ in self.values}
        for name, tensor, version in self.versions:
            if tensor._version != version and id(tensor) not in known and not tensor.requires_grad:
                self.values.append((name, tensor, tensor.detach().clone()))
                self.effects.tensors = (*self.effects.tensors, name)


def _get(name: Name) -> Tensor | None:
    module, table, key = name
    value = (vars(module)[table] if table else vars(module)).get(key)
    return value if isinstance(value, Tensor) else None


def _set(name: Name, tensor: Tensor) -> None:
    module, table, key = name
    is_parameter = table == "_parameters"
    (vars(module)[table] if table else vars(module))[key] = nn.Parameter(tensor, False) if is_parameter else tensor


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

    def tensors(self) -> Iterator[tuple[Name, Tensor]]:
        """The module's own tensors: attributes, buffers and parameters."""
        for table in ("", "_buffers", "_parameters"):
            for key, value in (self.values.get(table) or {} if table else self.values).items():
                if isinstance(value, Tensor) and not torch.nn.parameter.is_lazy(value):
                    yield (self.module, table, key), value

    def have_changed(self) -> bool:
        """Whether one was set, made or deleted."""
        return any(not _is_same(now, then) for now, then in [(vars(self.module), self.values), *self.tables])


class Contents:
    """Containers, arrays and generators, with what they hold.

    Args:
        value: What to keep, with all that it holds.

    Attributes:
        tensors: The tensors that were found, whose values are not kept unless :meth:`keep_tensors` does.
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._generators: dict[int, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {}
        self._values: dict[int, Tensor] = {}
        self._first = value
        self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, torch.Generator):
            self._generators[id(value)] = (value.get_state, value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._generators[id(value)] = (lambda: bits.state, lambda state: setattr(bits, "state", state), bits.state)
        elif isinstance(value, random.Random):
            self._generators[id(value)] = (value.getstate, value.setstate, value.getstate())
        elif isinstance(value, np.ndarray):
            self._arrays[id(value)] = (value, value.copy())
        elif isinstance(value, Metric):  # in a plain container
            self._add_attributes(value)
        elif isinstance(value, tuple):
            for item in value:
                self._add(item)
        elif isinstance(value, (dict, list, set, collections.deque)) and id(value) not in self._containers:
            self._containers[id(value)] = (value, value.copy())
            for item in value.values() if isinstance(value, dict) else value:
                self._add(item)
        elif not _OF_OTHERS.match(type(value).__module__) and hasattr(value, "__dict__") and not callable(value):
            self._add_attributes(value)

    def _add_attributes(self, value: Any) -> None:
        if id(value) not in self._containers:
            self._containers[id(value)] = (vars(value), dict(vars(value)))
            for item in vars(value).values():
                self._add(item)

    def keep_tensors(self, value_of: Callable[[Tensor], Tensor | None]) -> None:
        """Let other tensors with these values take the place of the tensors when they are put back."""
        found = [(tensor, value_of(tensor)) for tensor in self.tensors]
        self._values = {id(tensor): value for tensor, value in found if value is not None}

    def restore(self) -> None:
        """Put the contents back."""
        for _, set_state, state in self._generators.values():
            set_state(state)
        for container, contents in self._containers.values():
            contents = _with_values(contents, self._values) if self._values else contents
            if not _is_same(container, contents):
                container.clear()
                (container.extend if isinstance(container, (list, collections.deque)) else container.update)(contents)
        for array, numbers in self._arrays.values():
            np.copyto(array, numbers)

    def have_changed(self) -> bool:
        """Whether something holds something else now."""
        return (
            any(not _is_same(*pair) for pair in self._containers.values())
            or any(not _is_equal(*pair) for pair in self._arrays.values())
            or any(not _is_state(get_state(), state) for get_state, _, state in self._generators.values())
        )

    def has_only_grown(self) -> bool:
        """Whether the only change is that a list has got further items."""
        now, then = next(iter(self._containers.values()), ((), ()))
        if type(now) is not list or now is not self._first or len(now) < len(then):
            return False
        others = list(self._containers.values())[1:]
        unchanged = not self._arrays and not self._generators and all(_is_same(*pair) for pair in others)
        return unchanged and _is_same(now[: len(then)], then)


def _with_values(value: Any, values: dict[int, Tensor]) -> Any:
    """A container's copy with tensors, also those in tuples, replaced by clones of others, by identity."""
    if isinstance(value, Tensor):
        return values[id(value)].clone() if id(value) in values else value
    if isinstance(value, dict):
        return {key: _item_with(item, values) for key, item in value.items()}
    parts = [_item_with(item, values) for item in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _item_with(item: Any, values: dict[int, Tensor]) -> Any:
    return _with_values(item, values) if isinstance(item, (Tensor, tuple)) else item


def _is_equal(array: np.ndarray, numbers: np.ndarray) -> bool:
    return np.array_equal(array, numbers, equal_nan=array.dtype.kind in "fc")


def _is_state(now: Any, then: Any) -> bool:
    return torch.equal(now, then) if isinstance(then, Tensor) else bool(now == then)


def _is_same(container: Any, contents: Any) -> bool:
    if len(container) != len(contents):
        return False
    if isinstance(contents, dict):
        return all(name in container and container[name] is value for name, value in contents.items())
    if isinstance(contents, set):
        return bool(container == contents)
    return all(now is then for now, then in zip(container, contents, strict=True))
