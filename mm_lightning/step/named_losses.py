"""Losses that the user names: they alone are mixed, and all else stays on the batch's own targets."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.arguments import plain, refusal
from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["LossSpec", "NamedLosses", "check_loss"]

LossSpec = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]

_OWN, _PARTNERS, _MIXED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class LossSite:
    """A name under which user code finds a loss."""

    namespace: dict[str, Any]
    key: str
    loss: Callable[..., Any]
    name: str


class NamedLosses:
    """The losses that a specification names, which are evaluated for both halves and interpolated.

    Args:
        module: The LightningModule.
        spec: The name of an attribute of ``module`` (dotted for one of a part of it), a loss module, a function, or a
            list of these. A function is found as an attribute of ``module``, or as a global name where its class is
            defined.

    Raises:
        ValueError: If there is no such attribute, or the function is not found.
        TypeError: If it is no function.
    """

    def __init__(self, module: nn.Module, spec: LossSpec) -> None:
        self.sites = [
            site
            for part in _parts(spec)
            for site in (_by_name(module, part) if isinstance(part, str) else _by_object(module, part))
        ]
        self._values: list[list[Any]] = [[], []]
        self._mode = _OWN
        self._next = 0
        self._ratio: Any = None
        self._is_inside = False

    def values(self, of_partners: bool) -> list[Tensor]:
        """What the losses were in one of the halves."""
        return tensors_in(self._values[of_partners])

    @contextmanager
    def half(self, is_partners: bool) -> Iterator[None]:
        """Keep what the losses are in the own half or in the partners', or return the interpolation of both."""
        before, next_before = self._mode, self._next
        self._mode = _MIXED if self._ratio is not None else int(is_partners)
        self._next = 0
        if self._mode != _MIXED:
            self._values[self._mode].clear()
        was_there = [(site, site.key in site.namespace, site.namespace.get(site.key)) for site in self.sites]
        try:
            for site in self.sites:
                site.namespace[site.key] = _Stand(functools.partial(self._call, site), site.loss)
            yield
        finally:
            self._mode, self._next = before, next_before
            for site, was, value in was_there:
                if was:
                    site.namespace[site.key] = value
                else:
                    site.namespace.pop(site.key, None)

    @contextmanager
    def interpolating(self, ratio: Any) -> Iterator[None]:
        """Let the halves until the end of the ``with`` block return ``ratio * own + (1 - ratio) * partners'``.

        Raises:
            RuntimeError: If no loss was called, or not as often in both halves.
        """
        own, partners = map(len, self._values)
        names = ", ".join(dict.fromkeys(site.name for site in self.sites))
        if not own:
            raise RuntimeError(f"loss={names} was not called in training_step, so nothing would be mixed.")
        if own > partners:
            raise RuntimeError(f"loss={names} was called {own} times on the targets, {partners} on the partners'.")
        self._ratio = ratio
        try:
            yield
        finally:
            self._ratio = None

    def _call(self, site: LossSite, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside:  # a named loss calls another
            return site.loss(*args, **kwargs)
        if self._mode == _MIXED:
            own, partners = (values[self._next] for values in self._values)
            self._next += 1
            others = iter(tensors_in(partners))
            return map_tensors(lambda tensor: self._between(tensor, next(others)), own)
        self._is_inside = True
        try:
            value = site.loss(*args, **kwargs)
        finally:
            self._is_inside = False
        self._values[self._mode].append(value)
        return value

    def _between(self, own: Tensor, partners: Tensor) -> Tensor:
        ratio = self._ratio.to(own.dtype) if isinstance(self._ratio, Tensor) else self._ratio
        return ratio * own + (1 - ratio) * partners


class _Stand:
    """Stands in for a loss: it is called in its place, and has its attributes."""

    def __init__(self, call: Callable[..., Any], loss: Callable[..., Any]) -> None:
        self._call, self._loss = call, loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


def check_loss(spec: Any) -> None:
    """Refuse a specification of losses that is none in any module.

    Raises:
        TypeError: If a part of it is neither a name nor a function or module; a class is none.
        ValueError: If it is empty.
    """
    parts = _parts(spec)
    if not parts:
        raise ValueError(f"loss must name at least one loss, got {spec!r}. None mixes what training_step returns.")
    for part in parts:
        if isinstance(part, type) or not (isinstance(part, str) or callable(part)):
            expected = "an attribute's name, a loss module, a function or a list of these"
            raise refusal("loss", part, expected, "None mixes what training_step returns.")


def _parts(spec: Any) -> list[Any]:
    parts = plain(spec)
    return parts if isinstance(parts, list) else [parts]


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
    return _sites_of_module(module, loss, name) if isinstance(loss, nn.Module) else [_site(holder, last, loss, name)]


def _by_object(module: nn.Module, loss: Callable[..., Any]) -> list[LossSite]:
    name = getattr(loss, "__name__", type(loss).__name__)
    if isinstance(loss, nn.Module):
        return _sites_of_module(module, loss, name)
    if (owner := getattr(loss, "__self__", None)) is not None and hasattr(owner, "__dict__"):
        return [_site(owner, name, loss, name)]
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


def _site(holder: Any, key: str, loss: Callable[..., Any], name: str) -> LossSite:
    return LossSite(vars(holder), key, loss, name)


def _sites_of_module(root: nn.Module, loss: nn.Module, name: str) -> list[LossSite]:
    """A loss module where its calls come by: its forward, or where its class calls it in its own way, its holders."""
    if type(loss).__call__ is nn.Module.__call__:
        return [LossSite(vars(loss), "forward", loss.forward, name)]
    holders = [(part, key) for part in root.modules() for key, child in part._modules.items() if child is loss]
    return [LossSite(vars(part), key, loss, name) for part, key in holders]
