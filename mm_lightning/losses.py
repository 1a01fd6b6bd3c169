"""Losses that the user names: found in the module, and evaluated on both target sets while a step is mixed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm_lightning.mixup import Mixer, mix_loss

__all__ = ["LossSite", "LossSpec", "find_losses", "mixed_at"]

LossSpec = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class LossSite:
    """A name under which user code finds a loss."""

    namespace: dict[str, Any]
    key: str
    loss: Callable[..., Any]
    name: str


def find_losses(module: nn.Module, spec: LossSpec) -> list[LossSite]:
    """Find the losses that ``spec`` names.

    Args:
        module: The LightningModule.
        spec: The name of an attribute of ``module`` (dotted for one of a part of it), a loss module, a function, or a
            list of these. A function is found as an attribute of ``module``, or as a global name where its class is
            defined.

    Raises:
        ValueError: If there is no such attribute, or the function is not found.
        TypeError: If it is no function.
    """
    parts: list[Any] = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    return [
        site
        for part in parts
        for site in (_by_name(module, part) if isinstance(part, str) else _by_object(module, part))
    ]


@contextmanager
def mixed_at(sites: Sequence[LossSite], mixer: Mixer) -> Iterator[None]:
    """Evaluate these losses on both target sets until the end of the ``with`` block."""
    before = [(site, site.key in site.namespace, site.namespace.get(site.key)) for site in sites]
    try:
        for site in sites:
            mixed = functools.partial(mix_loss, site.loss, site.name, mixer)
            site.namespace[site.key] = functools.update_wrapper(mixed, site.loss, ("__name__", "__doc__"), ())
        yield
    finally:
        for site, was_there, value in before:
            if was_there:
                site.namespace[site.key] = value
            else:
                site.namespace.pop(site.key, None)


def _by_name(module: nn.Module, name: str) -> list[LossSite]:
    holder: Any = module
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part, None)
    loss = getattr(holder, last, None)
    if loss is None:
        raise ValueError(f"loss={name!r} is no attribute of {type(module).__name__}.")
    if not callable(loss):
        raise TypeError(f"loss={name!r} is a {type(loss).__name__}, which cannot be called. Name a loss function.")
    if isinstance(loss, nn.Module):
        return [LossSite(loss.__dict__, "forward", loss.forward, name)]
    return [LossSite(vars(holder), last, loss, name)]


def _by_object(module: nn.Module, loss: Callable[..., Any]) -> list[LossSite]:
    name = getattr(loss, "__name__", type(loss).__name__)
    if not callable(loss):
        raise TypeError(f"loss takes names of attributes and functions, got {loss!r}.")
    if isinstance(loss, nn.Module):
        return [LossSite(loss.__dict__, "forward", loss.forward, name)]
    if (owner := getattr(loss, "__self__", None)) is not None and hasattr(owner, "__dict__"):
        return [LossSite(vars(owner), name, loss, name)]
    spaces = [vars(part) for part in module.modules()]
    spaces.append(vars(torch.nn.functional))  # where loss modules find it, too
    spaces += [vars(sys.modules[cls.__module__]) for part in module.modules() for cls in type(part).__mro__[:-1]]
    found = {(id(space), key): (space, key) for space in spaces for key, value in space.items() if value is loss}
    if not found:
        raise ValueError(
            f"loss={name} was found neither as an attribute of {type(module).__name__} nor as a global name where it "
            "is defined. Make it an attribute, and name that."
        )
    return [LossSite(space, key, loss, name) for space, key in found.values()]
