"""One look at a training step before anything trains: which tensors are targets, and where the batch may be mixed."""

from __future__ import annotations

import collections
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mm_lightning.mixup import INPUT, Layer, named_layers
from mm_lightning.mixup.graph import Place, find_places
from mm_lightning.mixup.masks import MaskSite, sites_after
from mm_lightning.mixup.trace import Trace, trace_modules

__all__ = ["Roles", "View", "look_at", "signature_of"]

Signature = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Roles:
    """What the tensors of a batch are for; indices count its tensors of one dimension or more.

    Attributes:
        targets: Those that the loss compares with.
        inputs: Those that are computed through.
        masks: Integers that select or scale hidden states.
    """

    targets: frozenset[int]
    inputs: frozenset[int]
    masks: frozenset[int]


@dataclass(frozen=True, eq=False)
class View:
    """What a training step was seen to do with a batch.

    Attributes:
        roles: What the tensors of the batch are for.
        places: Every module as a place to mix at, in the order of ``named_modules``.
        embeddings: The modules at whose output integers of the batch become floating point numbers.
        input_problem: Why the batch itself cannot be mixed; empty if it can.
        input_shape: Shape of the first tensor that is computed through.
        has_loss: Whether there is anything to train on.
        masks: Arguments in which modules take masks of the batch.
        ends: When each module ended, on the clock of ``masks``.
    """

    roles: Roles
    places: tuple[Place, ...]
    embeddings: tuple[str, ...]
    input_problem: str
    input_shape: tuple[int, ...] | None
    has_loss: bool
    masks: tuple[MaskSite, ...] = ()
    ends: Mapping[str, int] = field(default_factory=dict)

    def masks_after(self, layers: Sequence[Layer], root: nn.Module) -> dict[str, list[tuple[nn.Module, MaskSite]]]:
        """For each layer the modules that take a mask after it, and in which argument."""
        modules = named_layers(root)
        names = {layer.name: [name for name in modules if modules[name] in layer.modules] for layer in layers}
        return {
            layer.name: [
                (modules[site.name], site)
                for site in sites_after(layer, self.masks, self.ends, names[layer.name])
                if site.name not in names[layer.name]
            ]
            for layer in layers
        }

    def input_layer(self, root: nn.Module) -> Layer:
        """The layer ``"input"``: the batch, and the embeddings of its integers."""
        modules = named_layers(root)
        return Layer(INPUT, tuple(modules[name] for name in self.embeddings))


def look_at(
    module: pl.LightningModule, batch: Any, batch_idx: int, batch_size: int, batch_dim: int | dict[str, int] = 0
) -> View:
    """Run ``training_step`` once without training, and follow the batch through it.

    Weights, buffers, metrics, other attributes, gradients and random states are put back; nothing is logged; optimizers
    and backward passes do not run. It costs about one forward pass, and the memory of a copy of the module's tensors
    while it lasts.

    Args:
        module: The module. Its modes (train or eval) are left as they are.
        batch: A batch on its device. Not changed.
        batch_idx: Its index.
        batch_size: Number of rows.
        batch_dim: Dimension of layers' outputs that holds the batch.

    Raises:
        Exception: What ``training_step`` raises.
    """
    trace = Trace()
    tensors: list[Tensor] = []

    def follow(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        tensors.append(tensor)
        return trace.follow(tensor)

    modules = named_layers(module)
    with ExitStack() as stack:
        for context in (_kept_random_states(tensors), _kept(module), _without_effects(module, trace)):
            stack.enter_context(context)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(trace.close)
        traced = apply_to_collection(batch, Tensor, follow)
        with trace_modules(modules, trace):
            output = None
            with suppress(_Stop):
                output = _call(module.training_step, traced, batch_idx)
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor):
            trace.end_in(loss)
    dims = batch_dim if isinstance(batch_dim, dict) else {}
    default = 0 if isinstance(batch_dim, dict) else batch_dim
    places = {place.name: place for place in find_places(trace, modules, batch_size, default)}
    for name, dim in dims.items():
        places.update({place.name: place for place in find_places(trace, [name], batch_size, dim)})
    return _view(trace, tuple(places.values()), tensors)


def signature_of(batch: Any) -> Signature:
    """What batches have in common whose tensors are for the same: number, types and dimensions of the tensors."""
    found: list[Any] = []
    apply_to_collection(batch, Tensor, lambda tensor: found.append((tensor.dtype, tensor.dim())))
    return tuple(found)


def _view(trace: Trace, places: tuple[Place, ...], tensors: list[Tensor]) -> View:
    inputs, modulating = set(), set()
    for entry in trace.entries:
        indices = frozenset().union(*(trace.origins[parent] for parent in entry.parents))
        if entry.is_input:
            (inputs if entry.is_value else modulating).update(indices)
    entered = [entry for entry in trace.entries if entry.is_input and entry.is_value]
    embeddings, problem = [], ""
    for entry in entered:
        if all(trace.is_integer[i] for parent in entry.parents for i in trace.origins[parent]):
            at = [place for place in places if entry.node in place.embeds]
            if at:
                embeddings.append(at[0].name)
            elif not problem:
                problem = (
                    f"integers of the batch enter the network in '{entry.name}', not in a module such as nn.Embedding "
                    "at whose output they could be mixed"
                )
    if not entered:
        problem = "nothing of the batch reaches the loss through weights that are trained"
    unusable = {place.name for place in places if place.verdict == "unusable"}
    return View(
        Roles(frozenset(trace.targets), frozenset(inputs), frozenset(modulating - inputs)),
        places,
        tuple(dict.fromkeys(embeddings)),
        problem,
        next((tuple(tensors[i].shape) for i in sorted(inputs)), None),
        bool(trace.losses),
        tuple(mask for mask in trace.masks if mask.name not in unusable),  # a loss module takes targets so
        {name: call.end for name, call in trace.calls.items()},
    )


def _call(step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    parameters = inspect.signature(step).parameters
    takes_index = "batch_idx" in parameters or len(parameters) > 1
    return step(batch, batch_idx) if takes_index else step(batch)


class _Stop(Exception):
    """The step has reached an optimizer that is not Lightning's."""


class _InertOptimizer:
    """Stands for an optimizer in manual optimization: shows its settings, and does nothing."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Evaluate the closure, which holds the loss."""
        return None if closure is None else closure()

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Leave gradients alone."""

    @contextmanager
    def toggle_model(self, *_: Any, **__: Any) -> Iterator[None]:
        """Leave the parameters as they are."""
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@contextmanager
def _without_effects(module: pl.LightningModule, trace: Trace) -> Iterator[None]:
    """Log nothing, train nothing."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        trace.end_in(loss)

    def stop(*_: Any) -> None:
        raise _Stop

    silenced = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    replaced: dict[str, Any] = dict.fromkeys(silenced, nothing) | {"manual_backward": backward}
    if not module.automatic_optimization:
        optimizers = _optimizers(module)
        replaced["optimizers"] = lambda *_, **__: optimizers[0] if len(optimizers) == 1 else optimizers
        replaced["lr_schedulers"] = nothing
    trainer = module._trainer  # the property raises where there is none
    loggers = [] if trainer is None else trainer.loggers
    before = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    handle = register_optimizer_step_pre_hook(stop)
    module.__dict__.update(replaced)
    try:
        if trainer is not None:
            trainer.loggers = []
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for name in replaced:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
        handle.remove()


def _optimizers(module: pl.LightningModule) -> list[_InertOptimizer]:
    if module._trainer is not None:
        found = module.optimizers()
    else:
        found = module.configure_optimizers()  # to know how many there are
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (list, tuple)):
            found = found[0]
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    found = [item["optimizer"] if isinstance(item, dict) else item for item in found]
    return [
        _InertOptimizer(optimizer)
        for optimizer in found
        if isinstance(getattr(optimizer, "_optimizer", optimizer), Optimizer)
    ]


@contextmanager
def _kept_random_states(tensors: list[Tensor]) -> Iterator[None]:
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's own)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Put back every tensor and container that belongs to the module, with its contents."""
    kept = _Kept()
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name not in ("_modules", "_trainer", "_fabric") and not name.endswith("hooks"):
                kept.add(value)
    modules = [(part, dict(part.__dict__), part.training) for part in module.modules()]
    grads = [(parameter, parameter.grad) for parameter in module.parameters()]
    for _, grad in grads:
        kept.add(grad)
    required = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for part, attributes, training in modules:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part.training = training
        for parameter, grad in grads:
            parameter.grad = grad
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        kept.restore()


class _Kept:
    """Tensors and containers with their contents."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.containers: dict[int, tuple[Any, Any]] = {}

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self.tensors and not isinstance(value, nn.parameter.UninitializedTensorMixin):
                self.tensors[id(value)] = (value, value.detach().clone())
        elif isinstance(value, tuple):
            for item in value:
                self.add(item)
        elif isinstance(value, (dict, list, set, collections.deque)) and id(value) not in self.containers:
            self.containers[id(value)] = (value, value.copy())
            for item in value.values() if isinstance(value, dict) else value:
                self.add(item)

    @torch.no_grad()
    def restore(self) -> None:
        for container, contents in self.containers.values():
            container.clear()
            (container.extend if isinstance(container, (list, collections.deque)) else container.update)(contents)
        for tensor, contents in self.tensors.values():
            if not torch.equal(tensor.detach(), contents):
                tensor.detach().copy_(contents)
