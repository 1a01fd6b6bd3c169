"""Standing in for a module's ``training_step`` during a fit, and putting it back."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mm_lightning.namespaces import LightningModule

__all__ = ["Attached", "check_compiler", "compiled_with", "is_compiled"]


class Attached:
    """Puts a function in the place of a module's ``training_step``, until :meth:`release`.

    On the instance, where it also stands behind the redirection that DDP and FSDP call ``training_step`` through. Where
    Lightning has compiled the whole step, the step itself is used, and the calls of modules in it are compiled.

    Args:
        module: The module.
        run: Takes the module's own step, its arguments and keyword arguments.

    Attributes:
        original: The module's own step.
    """

    def __init__(self, module: LightningModule, run: Callable[..., Any]) -> None:
        self.module = module
        context = getattr(module, "_compiler_ctx", None)  # where Lightning keeps what it compiled
        self.original = module.training_step if context is None else context["original_training_step"]

        def step(*args: Any, **kwargs: Any) -> Any:
            return run(self.original, args, kwargs)

        self._stand_in = _StandIn(self.original, step, vars(module).get("training_step"))
        module.training_step = self._stand_in  # type: ignore[method-assign]

    def release(self) -> None:
        """Put the step back; where another function stands in for this one, when that is released."""
        self._stand_in.release()
        found = vars(self.module).pop("training_step", None)
        while isinstance(found, _StandIn) and found.is_released:
            found = found.replaced
        if found is not None:
            self.module.training_step = found  # type: ignore[method-assign]


class _StandIn:
    """A class, not a function, so that a copied module gets its own step."""

    def __init__(self, original: Callable[..., Any], step: Callable[..., Any], replaced: Any) -> None:
        functools.update_wrapper(self, inspect.unwrap(original), updated=())  # Lightning looks for the module's own
        self._step, self._original = step, original
        self.replaced = replaced
        self.is_released = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def release(self) -> None:
        """From now on be the original."""
        self._step, self.is_released = self._original, True

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        return _itself, (self.__wrapped__,)  # type: ignore[attr-defined]


def _itself(step: Any) -> Any:
    return step


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has been applied to ``module`` or to a part of it."""
    dynamo = sys.modules.get("torch._dynamo")  # a second to import, and imported already if anything was compiled
    if dynamo is None:
        return False
    wrapped = getattr(module, "_compiler_ctx", None) is not None
    return wrapped or any(
        isinstance(part, dynamo.OptimizedModule) or part._compiled_call_impl is not None for part in module.modules()
    )


def check_compiler(module: nn.Module) -> None:
    """Refuse what is compiled by a torch whose compiler does not take what mixing does.

    Raises:
        RuntimeError: Below torch 2.8.
    """
    if torch.__version__ < "2.8" and is_compiled(module):
        raise RuntimeError(
            f"{type(module).__name__} is compiled, and manifold mixup with torch.compile needs torch >= 2.8; this is "
            f"{torch.__version__}. Update torch, or train without torch.compile."
        )


def compiled_with(module: LightningModule) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]] | None:
    """How to compile calls of a module's parts as Lightning has compiled its step; None if it has not."""
    context = getattr(module, "_compiler_ctx", None)
    if context is None:
        return None
    calls: dict[nn.Module, Callable[..., Any]] = {}

    def compiled(part: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        if part is module:  # whose forward is compiled
            return call
        if part not in calls:
            calls[part] = context["dynamo_ctx"](call)
        return calls[part]

    return compiled
