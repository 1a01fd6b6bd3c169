"""Running a training step so that it leaves no trace: nothing is trained, logged, counted, drawn or written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_lightning.namespaces import LightningModule
from mm_lightning.step.effects import Attributes, Contents, Effects, Started, held_by
from mm_lightning.step.host import Host
from mm_lightning.step.replay import RandomState, torch_states

__all__ = ["Watched", "without_trace"]


@contextmanager
def without_trace(host: Host, batch: Any, backward: Callable[..., Any]) -> Iterator[Writes]:
    """Run something of the module, and put everything back.

    Args:
        host: Of the module.
        batch: The batch that it runs on.
        backward: Gets the losses of manual optimization.

    Yields:
        What is written into, and the switch for noise.
    """
    module = host.module
    with ExitStack() as stack:
        random_state = RandomState()
        stack.callback(random_state.restore)
        writes = stack.enter_context(_kept(module, batch))
        stack.enter_context(host.silent(backward))
        stack.enter_context(torch.enable_grad())
        if hasattr(torch.compiler, "set_stance"):  # since torch 2.6; below, nothing compiled is mixed
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(writes)
        yield writes


class Writes(TorchDispatchMode):
    """Keeps the tensors of a module that are written into, when they are: a forward pass writes into few.

    Attributes:
        kept: The tensors with their values.
        move: Permutes the rows of noise that is drawn; None leaves it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.move: Callable[[Tensor], Tensor] | None = None
        self._known: dict[int, list[Tensor]] = {}

    def know(self, tensor: Tensor) -> None:
        """Keep ``tensor`` before it is written into."""
        if (memory := _memory(tensor)) is not None:
            self._known.setdefault(memory, []).append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at what ``func`` writes into, by its schema, and call it."""
        kwargs = kwargs or {}
        written, names, is_random = _facts_of(func)
        for place, name in written:
            for tensor in tree_leaves(args[place] if place < len(args) else kwargs.get(name)):
                self._keep(tensor)
        if not is_random:
            return func(*args, **kwargs)
        args, kwargs = _without_dropout(names, args, kwargs)
        if self.move is None:
            return func(*args, **kwargs)
        before = torch_states()
        result = func(*args, **kwargs)
        if not all(map(torch.equal, before, torch_states())):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    tensor.copy_(self.move(tensor))
        return result

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """What a tensor held before it was written into; None if it was not."""
        memory = _memory(tensor)
        return next((values for kept, values in self.kept.values() if kept is tensor or _memory(kept) == memory), None)

    def restore(self) -> None:
        """Put the values back."""
        with torch.no_grad():
            for tensor, values in self.kept.values():
                tensor.copy_(values)

    def _keep(self, tensor: Any) -> None:
        memory = _memory(tensor) if isinstance(tensor, Tensor) else None
        for known in self._known.get(memory, ()) if memory is not None else ():
            if id(known) not in self.kept:
                self.kept[id(known)] = (known, known.detach().clone())


class Watched(Effects):
    """The effects of a step while the look finds out what they are: whatever belongs to some modules is put back.

    Args:
        modules: The modules outside of the calls that are taken over.
        writes: What is written into.

    Attributes:
        found: What the step was seen to change.
        problem: Why its partners' half cannot be put back; empty if it can.
    """

    def __init__(self, modules: Sequence[nn.Module], writes: Writes) -> None:
        containers = [
            (part, name, False) for part in modules for name, value in held_by(part) if not isinstance(value, Tensor)
        ]
        super().__init__(modules, containers, draws=True)  # it is not known yet whether numbers are drawn
        self.writes = writes
        self.found = Effects(modules)
        self.problem = ""

    def start(self) -> Started:
        """Keep everything."""
        return _WatchedStart(self)


class _WatchedStart(Started):
    def __init__(self, effects: Watched) -> None:
        super().__init__(effects)
        self.watched = effects
        tensors = [tensor for kept in self.attributes for _, tensor in kept.tensors()]
        self._buffers = {id(t): t.detach().clone() for t in tensors if not isinstance(t, nn.Parameter)}

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Note what both halves change."""
        self._note()
        with super().put_back():
            try:
                yield
            finally:
                self._note()

    def learn(self) -> None:
        """All is noted."""

    def _note(self) -> None:
        found, writes = self.watched.found, self.watched.writes
        for kept in self.attributes:
            for name, tensor in kept.tensors():
                values = writes.value_of(tensor)
                before = self._buffers.get(id(tensor))
                if values is None and before is not None and not _is_equal(tensor, before):
                    values = before  # batch normalisation does not say in its schema what it writes into
                if values is None or name in found.tensors:
                    continue
                if tensor.requires_grad:
                    self.watched.problem = f"training_step writes into the trained parameter {name[2]!r} itself"
                else:
                    found.tensors = (*found.tensors, name)
                    self.values.append((name, tensor, values))
        known = {at[:2] for at in found.containers}
        for at, contents in self.contents:
            is_written = any(writes.value_of(tensor) is not None for tensor in contents.tensors)
            if is_written:
                contents.keep_tensors(writes.value_of)
            if at[:2] not in known and (is_written or (contents.have_changed() and not contents.has_only_grown())):
                found.containers = (*found.containers, (*at[:2], is_written))


@contextmanager
def _kept(module: LightningModule, batch: Any) -> Iterator[Writes]:
    """Put back attributes, what they hold, buffers and gradients; and of parameters what is written into."""
    writes = Writes()
    attributes = [Attributes(part) for part in module.modules()]
    contents = [Contents(value) for part in module.modules() for _, value in held_by(part)] + [Contents(batch)]
    for held in contents:
        for tensor in held.tensors:
            writes.know(tensor)
    parameters = [p for p in module.parameters() if not torch.nn.parameter.is_lazy(p)]
    for tensor in parameters:
        writes.know(tensor)
    # Batch normalisation updates its statistics without saying so in its schema.
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    before = [(p, p.grad, p.requires_grad, p.data) for p in parameters]
    for _, grad, *_ in before:
        if grad is not None:
            writes.know(grad)
    training = [(part, part.training) for part in module.modules()]
    try:
        yield writes
    finally:
        for kept in attributes:
            kept.restore()
        for part, mode in training:
            part.training = mode
        for held in contents:
            held.restore()
        writes.restore()
        with torch.no_grad():
            for tensor, values in buffers:
                if not _is_equal(tensor, values):
                    tensor.copy_(values)
        for parameter, grad, requires_grad, data in before:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
            if _memory(parameter) != _memory(data):
                parameter.data = data


@functools.cache
def _facts_of(func: Any) -> tuple[list[tuple[int, str]], list[str], bool]:
    """Of an operation: which arguments it writes into, the names of all, and whether it draws random numbers."""
    arguments = func._schema.arguments
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return written, [a.name for a in arguments], torch.Tag.nondeterministic_seeded in func.tags


def _without_dropout(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Switch off dropout inside of fused operations, whose result is no noise that could be reordered."""
    dropout = [name for name in names if name in ("dropout", "dropout_p") or (name == "p" and "train" in names)]
    places = {names.index(name): name for name in dropout}
    args = tuple(0.0 if place in places else value for place, value in enumerate(args))
    return args, {**kwargs, **{name: 0.0 for place, name in places.items() if place >= len(args) and name in kwargs}}


def _is_equal(tensor: Tensor, values: Tensor) -> bool:
    same = tensor == values
    return bool((same | (tensor.isnan() & values.isnan()) if tensor.is_floating_point() else same).all())


def _memory(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of one without memory of its own
        return None
