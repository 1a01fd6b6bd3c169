"""Running a training step so that it leaves no trace: nothing is trained, logged, counted, drawn or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_lightning.step.effects import Attributes, Contents, Effects
from mm_lightning.step.host import Host
from mm_lightning.step.replay import RandomState

__all__ = ["Watched", "without_trace"]

_NOT_OF_THE_USER = ("_modules", "_parameters", "_buffers", "_trainer", "_fabric")


@contextmanager
def without_trace(host: Host, backward: Callable[..., Any]) -> Iterator[Writes]:
    """Run something of the module, and put everything back.

    Args:
        host: Of the module.
        backward: Gets the losses of manual optimization.

    Yields:
        What is written into, and the switch for noise.
    """
    module = host.module
    with ExitStack() as stack:
        random_state = RandomState()
        stack.callback(random_state.restore)
        writes = stack.enter_context(_kept(module))
        stack.enter_context(host.silent(backward))
        stack.enter_context(torch.enable_grad())
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
        schema = func._schema
        if schema.is_mutable:
            given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tree_leaves(given.get(argument.name)):
                        self._keep(tensor)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        args, kwargs = _without_dropout(schema.arguments, args, kwargs)
        if self.move is None:
            return func(*args, **kwargs)
        before = RandomState()
        result = func(*args, **kwargs)
        if not before.equals(RandomState()):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    tensor.copy_(self.move(tensor))
        return result

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


class Watched:
    """Stands in for the effects of the partners' half while the look finds out what they are.

    Args:
        module: The module.
        writes: What is written into.
        runs: Modules that run in that half.

    Attributes:
        draws: True, so that random states are kept, because it is not known yet whether numbers are drawn.
        found: What the half changed.
    """

    draws = True

    def __init__(self, module: nn.Module, writes: Writes, runs: Sequence[nn.Module]) -> None:
        self._look = module, writes, runs
        self.found = Effects()

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Watch what changes. The look itself puts it back."""
        module, writes, runs = self._look
        attributes = [Attributes(part) for part in module.modules()]
        contents = [(part, name, _contents(value)) for part in module.modules() for name, value in _attributes(part)]
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        kept, writes.kept = writes.kept, {}
        try:
            yield
        finally:
            changed = [(part, name, held) for part, name, held in contents if held.has_changed()]
            written = {_memory(tensor) for tensor, _ in writes.kept.values()} - {None}
            tensors = [p for p in module.parameters() if _memory(p) in written]
            tensors += [buffer for buffer, values in buffers if not _is_equal(buffer, values)]
            self.found = Effects(
                _distinct([module, *runs, *(part.module for part in attributes if part.have_changed())]),
                tuple((part, name) for part, name, held in changed if not held.has_only_grown()),
                tuple((part, name) for part, name, held in changed if held.has_only_grown()),
                tuple((part, name) for part, name, held in contents if any(_memory(t) in written for t in held.held)),
                _distinct(tensors),
            )
            writes.kept = writes.kept | kept


@contextmanager
def _kept(module: pl.LightningModule) -> Iterator[Writes]:
    """Put back attributes, what they hold, buffers and gradients; and of parameters what is written into."""
    writes = Writes()
    contents = Contents(writes.know)  # type: ignore[arg-type]
    attributes = [Attributes(part) for part in module.modules()]
    for part in module.modules():
        for _, value in _attributes(part):
            contents.add(value)
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
        contents.restore()
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


def _without_dropout(arguments: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Switch off dropout inside of fused operations, whose result is no noise that could be reordered."""
    names = [argument.name for argument in arguments]
    dropout = [name for name in names if name in ("dropout", "dropout_p") or (name == "p" and "train" in names)]
    places = {names.index(name): name for name in dropout}
    args = tuple(0.0 if place in places else value for place, value in enumerate(args))
    return args, {**kwargs, **{name: 0.0 for place, name in places.items() if place >= len(args) and name in kwargs}}


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _NOT_OF_THE_USER and not name.endswith("hooks")
    ]


def _contents(value: Any) -> Contents:
    contents = Contents(lambda tensor: None)
    contents.add(value)
    return contents


def _distinct(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple({id(item): item for item in items}.values())


def _is_equal(tensor: Tensor, values: Tensor) -> bool:
    same = tensor == values
    return bool((same | (tensor.isnan() & values.isnan()) if tensor.is_floating_point() else same).all())


def _memory(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of one without memory of its own
        return None
