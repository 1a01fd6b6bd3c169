"""The LightningModule around a step: what it logs, its optimizers, and where its backward passes begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mm_lightning.namespaces import LightningModule

__all__ = ["Host", "Logged", "OptimizerReached"]

Logged = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""A call of ``self.log``: name, value, and the other arguments."""

Backward = Callable[..., Any]


class OptimizerReached(BaseException):
    """The step has reached an optimizer that is not one of ``self.optimizers()``.

    Not an Exception, which the step might catch.
    """


class Host:
    """Stands between a step and Lightning.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self._kind: Any = type(module)  # whose methods stand behind those that are replaced
        self._dummies: list[Any] = [DummyLogger()]

    @contextmanager
    def own_half(self, backward: Backward) -> Iterator[list[Logged]]:
        """Collect what the step logs. In manual optimization, ``backward`` gets its losses.

        Yields:
            The calls of ``self.log``, to be handed to :meth:`log`.
        """
        logged: list[Logged] = []
        replaced: dict[str, Any] = {"log": _collector(logged)}
        if not self.module.automatic_optimization:
            replaced["manual_backward"] = backward
        with _replaced(self.module, replaced):
            yield logged

    @contextmanager
    def silent(self, backward: Backward) -> Iterator[list[Logged]]:
        """Log nothing, print nothing and train nothing."""
        logged: list[Logged] = []
        replaced: dict[str, Any] = {"log": _collector(logged), "print": _nothing}
        trainer = self.module._trainer  # the property raises where there is none
        loggers = [] if trainer is None else trainer.loggers
        handle = None
        if not self.module.automatic_optimization:
            replaced |= dict.fromkeys(("toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _nothing)
            replaced |= {"manual_backward": backward, "optimizers": self._inert_optimizers}
            replaced["lr_schedulers"] = self._inert_schedulers
            handle = register_optimizer_step_pre_hook(_stop)
        with _replaced(self.module, replaced):
            try:
                if loggers and trainer is not None:
                    trainer.loggers = self._dummies * len(loggers)
                yield logged
            finally:
                if loggers and trainer is not None:
                    trainer.loggers = loggers
                if handle is not None:
                    handle.remove()

    def log(self, logged: list[Logged]) -> None:
        """Log what was collected."""
        for name, value, args, kwargs in logged:
            self.module.log(name, value, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The module's own ``manual_backward``."""
        self._kind.manual_backward(self.module, loss, *args, **kwargs)

    def _inert_optimizers(self, use_pl_optimizer: bool = True) -> Any:
        if self.module._trainer is not None and self.module._trainer.optimizers:
            found: Any = self._kind.optimizers(self.module, use_pl_optimizer)
            found = found if isinstance(found, list) else [found]
        else:
            found = self._configured("optimizer")
        return _as_returned([_inert(item) for item in found])

    def _inert_schedulers(self) -> Any:
        if self.module._trainer is not None and self.module._trainer.optimizers:
            found: Any = self._kind.lr_schedulers(self.module) or []
            found = found if isinstance(found, list) else [found]
        else:
            found = self._configured("lr_scheduler")
        return _as_returned([_inert(item) for item in found]) or None

    def _configured(self, kind: str) -> list[Any]:
        """What ``configure_optimizers`` returns, to know how many there are, where no trainer has asked for it."""
        found: Any = self.module.configure_optimizers()
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (list, tuple)):
            found = found[kind == "lr_scheduler"]
        found = list(found) if isinstance(found, (list, tuple)) else [found]
        found = [item.get(kind) if isinstance(item, dict) and kind in item else item for item in found]
        found = [item.get("scheduler") if isinstance(item, dict) else item for item in found]
        return [item for item in found if item is not None and isinstance(item, Optimizer) == (kind == "optimizer")]


def _as_returned(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _collector(logged: list[Logged]) -> Callable[..., None]:
    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged.append((name, value, args, kwargs))

    return log


def _inert(item: Any) -> Any:
    """A twin of an optimizer or a scheduler that shows its settings and does nothing, of the same class."""
    twin: Any = object.__new__(type(item))
    vars(twin).update(vars(item), step=_evaluate, zero_grad=_nothing, toggle_model=_toggle)
    return twin


def _evaluate(closure: Any = None, *_: Any, **__: Any) -> Any:
    return closure() if callable(closure) else None  # which holds the loss


@contextmanager
def _toggle(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _stop(*_: Any) -> None:
    raise OptimizerReached


@contextmanager
def _replaced(module: LightningModule, attributes: dict[str, Any]) -> Iterator[None]:
    """Set attributes of the instance, past ``nn.Module.__setattr__``, until the end of the ``with`` block."""
    own = vars(module)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
