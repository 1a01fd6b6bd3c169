"""One look at a training step before anything trains: which tensors are targets, and where the batch may be mixed."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchmetrics import Metric

from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan, TargetPair, named_layers
from mm_lightning.mixup.graph import Place, find_places
from mm_lightning.mixup.masks import MaskSite, sites_after
from mm_lightning.mixup.trace import CatchBackward, Trace, trace_modules

__all__ = ["Roles", "View", "check_losses", "look_at", "map_indexed", "signature_of"]

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

    def is_plain(self, index: int) -> bool:
        """Whether it is no target, nor might become one when the step does something else."""
        return index not in self.targets and (index in self.inputs or index in self.masks)


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
    module: pl.LightningModule,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    batch_dim: int | dict[str, int] = 0,
    describe: Callable[[str], bool] = lambda name: True,
) -> View:
    """Run ``training_step`` without training, and follow the batch through it.

    Weights, buffers, metrics, other attributes, gradients and random states are put back; nothing is logged; optimizers
    and backward passes do not run. It costs one forward pass and a walk over its graph, and the memory of a copy of the
    module's tensors while it lasts.

    Args:
        module: The module. Its modes (train or eval) are left as they are.
        step: Its ``training_step``.
        args: The step's arguments, the batch first. Not changed.
        kwargs: Its keyword arguments.
        batch_size: Number of rows.
        batch_dim: Dimension of layers' outputs that holds the batch.
        describe: Names of the modules to find a path around, where there is one.

    Raises:
        Exception: What ``training_step`` raises.
    """
    trace = Trace(trained=list(module.parameters()))
    tensors: list[Tensor] = []

    def follow(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        tensors.append(tensor)
        return trace.follow(tensor)

    modules = named_layers(module)
    with _apart(module, trace) as stack:
        stack.callback(trace.close)
        traced = apply_to_collection(args[0], Tensor, follow)
        stack.enter_context(trace_modules(modules, trace))
        _run(step, (traced, *args[1:]), kwargs, trace)
    places = find_places(trace, modules, batch_size, batch_dim, describe)
    return _view(trace, tuple(places), tensors)


def check_losses(
    module: pl.LightningModule,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    roles: Roles,
    batch_size: int,
    mixer: Mixer,
) -> None:
    """Prove that the partners' loss which pairs compute is the loss of the partners' targets.

    The step runs on unmixed inputs twice: on a batch with the partners' targets, and on pairs of targets with all
    weight on the partners'. What leaves the tensors (numbers, numpy, scripted functions) makes the two differ.

    Raises:
        RuntimeError: If they do.
    """
    partner = torch.arange(batch_size).roll(1)
    last = mixer.layers[-1].name  # where most of the step is before the mix
    plan = MixPlan(last, partner, torch.zeros(1).expand(batch_size), partner.argsort()).to(module.device)
    if roles.targets & roles.inputs:
        return  # what the network sees would be exchanged, too
    mixer.is_verified = True
    found: list[list[float]] = []
    for is_pair in (False, True):

        def exchange(tensor: Tensor, index: int, is_pair: bool = is_pair) -> Tensor:
            if roles.is_plain(index) or len(tensor) != batch_size:
                return tensor
            return TargetPair.wrap(tensor, plan, mixer) if is_pair else tensor.index_select(0, plan.partner)

        trace = Trace(trained=list(module.parameters()))
        with _apart(module, trace) as stack:
            stack.callback(mixer.stop)
            if is_pair:
                mixer.rehearse(plan)
            stack.enter_context(CatchBackward(trace))
            _run(step, (map_indexed(exchange, args[0]), *args[1:]), kwargs, trace)
            lost = next((loss.lost for loss in trace.loss_tensors if isinstance(loss, TargetPair) and loss.lost), None)
            if lost is not None:
                raise RuntimeError(lost)
            found.append([float(loss.detach()) for loss in trace.loss_tensors])
    wanted, got = (torch.tensor(losses, dtype=torch.float64) for losses in found)
    is_close = wanted.shape == got.shape and torch.allclose(got, wanted, rtol=_tolerance(module), equal_nan=True)
    if not is_close:
        raise RuntimeError(
            f"The loss of training_step cannot be followed: with the partners' targets it is {found[0]}, but the same "
            f"step on targets that know their partners' gives {found[1]}. Some of it is computed from the batch's "
            "targets in a way that nobody can see into: before the network runs, from Python numbers (tolist, item, "
            "numpy), from torch.tensor(targets) or by a scripted function. Compute it from the batch's tensors after "
            "the network has run, or name the losses to mix: ManifoldMixupCallback(loss=...)."
        )


def _tolerance(module: nn.Module) -> float:
    """How far the same loss may be from itself, relative: by the least precise numbers it is computed with."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or dtypes & {torch.half, torch.bfloat16}:
        return 2e-2
    return 1e-4 if torch.float32 in dtypes else 1e-9


def map_indexed(function: Callable[[Tensor, int], Tensor], batch: Any) -> Any:
    """Rebuild a batch from its tensors of one dimension or more, each with its number."""
    numbers = itertools.count()
    return apply_to_collection(
        batch, Tensor, lambda tensor: function(tensor, next(numbers)) if tensor.dim() else tensor
    )


def signature_of(batch: Any) -> Signature:
    """What batches have in common whose tensors are for the same: structure, names, types and dimensions."""
    if isinstance(batch, Tensor):
        return (batch.dtype, batch.dim())
    if isinstance(batch, Mapping):
        return tuple((key, signature_of(value)) for key, value in batch.items())
    if isinstance(batch, (list, tuple)):
        return tuple(signature_of(value) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return tuple((item.name, signature_of(getattr(batch, item.name, None))) for item in dataclasses.fields(batch))
    return (type(batch),)


@contextmanager
def _apart(module: pl.LightningModule, trace: Trace) -> Iterator[ExitStack]:
    """Run something of the module that leaves no trace in it."""
    with ExitStack() as stack:
        for context in (_kept_random_states(), _kept(module), _without_effects(module, trace)):
            stack.enter_context(context)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stack


def _run(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace) -> None:
    output = None
    with suppress(_Stop):
        output = step(*args, **kwargs)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        trace.end_in(loss)


def _view(trace: Trace, places: tuple[Place, ...], tensors: list[Tensor]) -> View:
    inputs: set[int] = set()
    modulating: set[int] = set()
    embeddings: list[str] = []
    problem = ""
    for entry in trace.entries:
        if not entry.is_input:
            continue
        origins = frozenset().union(*(trace.origins[parent] for parent in entry.parents))
        (inputs if entry.is_value else modulating).update(origins)
        values = frozenset().union(*(trace.values[parent] for parent in entry.parents)) if entry.is_value else ()
        at = [place.name for place in places if entry.node in place.embeds]
        if all(trace.is_integer[index] for index in origins) and at:
            embeddings.append(at[0])
        elif any(trace.is_integer[index] for index in values) and not problem:
            problem = (
                f"integers of the batch enter the network in '{entry.name}', not in a module such as nn.Embedding at "
                "whose output they could be mixed"
            )
    if not inputs:  # the graph does not tell, as with tensor parallelism: what is no target is taken for the input
        floats = [index for index, is_integer in enumerate(trace.is_integer) if not is_integer]
        inputs = set(floats) - trace.targets
        problem = "" if inputs else "nothing of the batch reaches the loss through weights that are trained"
    unusable = {place.name for place in places if place.verdict == "unusable"}
    return View(
        Roles(frozenset(trace.targets), frozenset(inputs), frozenset(modulating - inputs - trace.targets)),
        places,
        tuple(dict.fromkeys(embeddings)),
        problem,
        next((tuple(tensors[i].shape) for i in sorted(inputs)), None),
        bool(trace.losses),
        tuple(mask for mask in trace.masks if mask.name not in unusable),  # a loss module takes targets so
        {name: call.end for name, call in trace.calls.items()},
    )


class _Stop(Exception):
    """The step has reached an optimizer that is not Lightning's."""


class _Inert:
    """Stands for an optimizer or a scheduler in manual optimization: shows its settings, and does nothing."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self, closure: Any = None, **_: Any) -> Any:
        """Evaluate the closure, which holds the loss."""
        return closure() if callable(closure) else None

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
        trace.give_gradients()

    def stop(*_: Any) -> None:
        raise _Stop

    silenced = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    replaced: dict[str, Any] = dict.fromkeys(silenced, nothing) | {"manual_backward": backward}
    if not module.automatic_optimization:
        optimizers = _optimizers(module)
        replaced["optimizers"] = lambda *_, **__: optimizers[0] if len(optimizers) == 1 else optimizers
        schedulers: Any = None if module._trainer is None else module.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        inert = [_Inert(scheduler) for scheduler in schedulers]
        replaced["lr_schedulers"] = lambda: inert[0] if len(inert) == 1 else inert
    trainer = module._trainer  # the property raises where there is none
    loggers = [] if trainer is None else trainer.loggers
    before = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    handle = register_optimizer_step_pre_hook(stop)
    module.__dict__.update(replaced)
    try:
        if trainer is not None:
            trainer.loggers = [DummyLogger()] * bool(loggers)
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for name in replaced:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
        handle.remove()


def _optimizers(module: pl.LightningModule) -> list[_Inert]:
    found: Any
    if module._trainer is not None and module._trainer.optimizers:
        found = module.optimizers()
    else:
        found = module.configure_optimizers()  # to know how many there are
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (list, tuple)):
            found = found[0]
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    found = [item["optimizer"] if isinstance(item, dict) else item for item in found]
    return [
        _Inert(optimizer) for optimizer in found if isinstance(getattr(optimizer, "_optimizer", optimizer), Optimizer)
    ]


@contextmanager
def _kept_random_states() -> Iterator[None]:
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


# Objects of these packages hold the trainer, loaders and the like, which the look does not touch.
_OF_OTHERS = re.compile(r"(lightning|torch|torchmetrics|transformers|builtins|types|functools)\b")


class _Kept:
    """Tensors and containers with their contents."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.undo: list[Callable[[], Any]] = []

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self.tensors and not torch.nn.parameter.is_lazy(value):
                self.tensors[id(value)] = (value, value.detach().clone())
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self.undo.append(lambda: value.set_state(state))
        elif isinstance(value, np.random.Generator):
            numbers = copy.deepcopy(value.bit_generator.state)
            self.undo.append(lambda: setattr(value.bit_generator, "state", numbers))
        elif isinstance(value, random.Random):
            python = value.getstate()
            self.undo.append(lambda: value.setstate(python))
        elif isinstance(value, np.ndarray):
            array = value.copy()
            self.undo.append(lambda: np.copyto(value, array))
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
        for undo in self.undo:
            undo()
        for container, contents in self.containers.values():
            container.clear()
            (container.extend if isinstance(container, (list, collections.deque)) else container.update)(contents)
        for tensor, contents in self.tensors.values():
            if not torch.equal(tensor.detach(), contents):
                tensor.detach().copy_(contents)
