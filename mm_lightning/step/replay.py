"""Replaying the network: calls of modules return what they returned before, the same tensors of the same graph."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["RandomState", "Replay", "TakenOver", "called_by", "torch_states"]


@dataclass(frozen=True)
class TakenOver:
    """Which calls of one module the partners' half takes over from the own one.

    Attributes:
        is_mixed: Whether they return what the mixed network makes of the batch.
        numbers: Their numbers in the step, from 0; None for all.
        is_changed: The step changes what they return in place, so that it gets a copy.
        is_hooked: The step hooks the gradient of what they return, so that each half gets a view of its own.
    """

    is_mixed: bool = True
    numbers: frozenset[int] | None = None
    is_changed: bool = False
    is_hooked: bool = False


class RandomState:
    """The global random states of PyTorch (CPU, and the current GPU once it is in use), numpy and Python."""

    def __init__(self) -> None:
        self.torch = torch_states()
        self.numpy = np.random.get_state()  # noqa: NPY002 (the user's own)
        self.python = random.getstate()

    def restore(self) -> None:
        """Set them to what they were."""
        torch.set_rng_state(self.torch[0])
        for state in self.torch[1:]:
            torch.cuda.set_rng_state(state)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def equals(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        same_numpy = all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        return same_numpy and self.python == other.python and all(map(torch.equal, self.torch, other.torch))


def torch_states() -> list[Tensor]:
    """The states of PyTorch's generators: the CPU's, and the current GPU's once it is in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


class Replay:
    """One step's record of the network.

    Attributes:
        drew: Whether random numbers were drawn between the replayed calls, if that could be so.
        observe: Told of each replayed call, and with None of the beginning of the partners' half.

    Args:
        calls: What to take over of each module.
        draws: Whether the rest of the step draws random numbers. Then the random states after each call are kept, so
            that the partners' half draws the same.
        around: A context for the calls while they are recorded.
        compiled: Wraps a module's call where the whole step was compiled.
    """

    def __init__(
        self,
        calls: Sequence[tuple[nn.Module, TakenOver]],
        draws: bool = False,
        around: Callable[[], AbstractContextManager[Any]] | None = None,
        compiled: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.records = [_Record(module, taken) for module, taken in calls]
        self.around = around
        self.compiled = compiled
        self.draws = draws
        self.drew = False
        self.observe: Callable[[nn.Module | None, int], None] | None = None
        self._start = self._expected = RandomState() if draws else None

    @property
    def is_complete(self) -> bool:
        """Whether each of the modules was called, where that could be seen."""
        return all(record.outputs for record in self.records)

    def has_returned(self, tensor: Tensor) -> bool:
        """Whether a call of the mixed network has returned this tensor to the step."""
        return any(
            output is not None and output.value is tensor
            for record in self.records
            for output in record.outputs
            if record.taken.is_mixed and not record.taken.is_changed and not record.taken.is_hooked
        )

    def output(self, module: int, number: int) -> Any:
        """What a call of the module with this identity returned; None if it was not taken over."""
        record = next((record for record in self.records if id(record.module) == module), None)
        outputs = [] if record is None else record.outputs
        output = outputs[number] if number < len(outputs) else None
        return None if output is None else output.value

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the calls return."""
        with called_by(self._keep, self.records):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Return it again, from the first call on."""
        for record in self.records:
            record.next = 0
        if self.observe is not None:
            self.observe(None, 0)
        after = self._expected = RandomState()
        if self._start is not None:
            self._start.restore()
            self._expected = self._start
        try:
            with called_by(self._repeat, self.records):
                yield
        finally:
            self._check_draws()
            if self.drew or self._start is not None:
                after.restore()

    def _keep(self, record: _Record, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        taken, outputs = record.taken, record.outputs
        if self.compiled is not None:
            call = self.compiled(record.module, call)
        with self.around() if self.around is not None else nullcontext():
            value = call(*args, **kwargs)
        if taken.numbers is not None and len(outputs) not in taken.numbers:
            outputs.append(None)
            return value
        outputs.append(_Output(value, RandomState() if self.draws else None))
        if taken.is_changed:
            return map_tensors(torch.clone, value)
        return map_tensors(_view, value) if taken.is_hooked else _fresh(value)

    def _repeat(self, record: _Record, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = record.next
        record.next += 1
        output = record.outputs[number] if number < len(record.outputs) else None
        if output is None:  # not taken over, or not seen by the record, as in a compiled region
            return own_call(call)(*args, **kwargs)  # around the record, inside of which manual optimization replays
        output.check(record.module, record.taken)
        if self.observe is not None:
            self.observe(record.module, number)
        if output.random_state is not None:
            self._check_draws()
            output.random_state.restore()
            self._expected = output.random_state
        return map_tensors(_view, output.value) if record.taken.is_hooked else _fresh(output.value)

    def _check_draws(self) -> None:
        if not self.drew:
            self.drew = self._expected is not None and not self._expected.equals(RandomState())


class _Record:
    """What the calls of one module returned; None for one that is not taken over."""

    def __init__(self, module: nn.Module, taken: TakenOver) -> None:
        self.module, self.taken = module, taken
        self.outputs: list[_Output | None] = []
        self.next = 0


class _Output:
    """What a call returned."""

    def __init__(self, value: Any, random_state: RandomState | None) -> None:
        self.value = value
        self.random_state = random_state
        self._state = _state_of(value)

    def check(self, module: nn.Module, taken: TakenOver) -> None:
        """Raise RuntimeError if the step has done to it what it did not do when it was looked at."""
        now = _state_of(self.value)
        if now == self._state:
            return
        is_written = any(a[0] != b[0] for a, b in zip(now, self._state, strict=True))
        if is_written and not taken.is_changed:
            raise RuntimeError(
                f"training_step changes what {type(module).__name__} returns in place, which it did not do when "
                "manifold mixup looked at it, so the partners' loss cannot be computed from it. Change a copy: "
                "output.clone()."
            )
        if not is_written and not taken.is_hooked:
            raise RuntimeError(
                f"training_step hooks the gradient of what {type(module).__name__} returns, which it did not do when "
                "manifold mixup looked at it. Register the hook in every step, or not at all."
            )


def _state_of(value: Any) -> list[tuple[int, int]]:
    """Of each tensor, how often it was written into and how many hooks its gradient has."""
    return [(0 if t.is_inference() else t._version, len(t._backward_hooks or ())) for t in tensors_in(value)]


def _fresh(value: Any) -> Any:
    """The same tensors in new containers, which the step may fill."""
    return value if isinstance(value, Tensor) else map_tensors(lambda tensor: tensor, value)


def _view(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


@contextmanager
def called_by(instead: Callable[[Any, Callable[..., Any], Any, Any], Any], records: Sequence[Any]) -> Iterator[None]:
    """Let calls of modules, with all of their hooks, go through a function until the end of the ``with`` block.

    ``nn.Module.__call__`` looks up ``_compiled_call_impl`` in every call, which is how ``module.compile()`` works. It
    is set past ``__setattr__``, which forwards it in a module that ``torch.compile`` has wrapped.

    Args:
        instead: Gets a record, the call, its arguments and its keyword arguments.
        records: Objects with a ``module`` each.
    """
    key = "_compiled_call_impl"
    before = [(record, vars(record.module), vars(record.module).get(key)) for record in records]
    for record, attributes, compiled in before:
        attributes[key] = _call_through(instead, record, compiled or record.module._call_impl)
    try:
        yield
    finally:
        for _, attributes, compiled in before:
            if compiled is None:
                attributes.pop(key, None)
            else:
                attributes[key] = compiled


def _call_through(instead: Any, record: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return instead(record, call, args, kwargs)

    called._own_call = own_call(call)  # type: ignore[attr-defined]
    return called


def own_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """The module's own call behind those that stand in its place."""
    own: Callable[..., Any] = getattr(call, "_own_call", call)
    return own
