"""Running something of a module that leaves no trace in it: nothing is trained, logged, counted or drawn."""

from __future__ import annotations

import collections
import copy
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchmetrics import Metric

from mm_lightning.mixup.trace import Trace

__all__ = ["OptimizerReached", "apart"]


class OptimizerReached(Exception):
    """The step has reached an optimizer that is not Lightning's."""


@contextmanager
def apart(module: pl.LightningModule, trace: Trace) -> Iterator[ExitStack]:
    """Run something of the module that leaves no trace in it."""
    with ExitStack() as stack:
        for context in (_kept_random_states(), _kept(module), _without_effects(module, trace)):
            stack.enter_context(context)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stack


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
        raise OptimizerReached

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
