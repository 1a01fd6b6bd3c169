"""A call on pairs while ``torch.compile`` traces it: both halves at once, in operations that trace without a break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from mm_lightning.mixup.expression import is_in_place, is_linear, is_random
from mm_lightning.mixup.pair import Pair, value_of
from mm_lightning.mixup.targets import cross_entropy_of_pair

__all__ = ["compiled_call"]


def compiled_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Both halves of a call, in few and plain operations.

    Raises:
        RuntimeError: If the call changes targets in place or draws random numbers for them.
    """
    name = getattr(func, "__name__", str(func))
    first, *_ = pairs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pair)]
    if is_in_place(name, kwargs) or is_random(name):
        raise RuntimeError(f"'{name}' on the batch's targets cannot be followed in a compiled training_step.")
    lam = first.plan.lam[0] if first.plan.lam.stride(0) == 0 else first.plan.lam
    if lam.dim() > 0 and all(pair.is_mixed for pair in pairs) and is_linear(name, pairs, args, kwargs):
        return _pair(_run(value_of, func, args, kwargs), first, True, None)
    own = _run(_own, func, args, kwargs)
    halves, spec = tree_flatten(own)
    if not any(isinstance(half, Tensor) for half in halves):
        return _run(value_of, func, args, kwargs) if first.is_mixed else own
    requires_grad = any(isinstance(half, Tensor) and half.requires_grad for half in halves)
    if requires_grad and (first.mixer.is_explicit or not first.mixer.has_mixed):
        return own
    is_mixed = requires_grad or any(pair.is_mixed for pair in pairs)
    if is_mixed:
        first.mixer.losses.append(name)
    if is_mixed and lam.dim() > 0 and func is F.cross_entropy and len(pairs) == 1:
        return _pair(_cross_entropy(first, lam, *args, **kwargs), first, True, None)
    others = tree_leaves(_run(_partner, func, args, kwargs))
    results = [
        _interpolated(half, other, first, is_mixed, lam, name) if isinstance(half, Tensor) else half
        for half, other in zip(halves, others)  # noqa: B905 (strict is not traced)
    ]
    return tree_unflatten(results, spec)


def _run(side: Callable[[Any], Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*tree_map_only(Pair, side, args), **tree_map_only(Pair, side, kwargs))


def _interpolated(own: Tensor, partner: Tensor, like: Pair, is_mixed: bool, lam: Tensor, name: str) -> Pair:
    if not is_mixed or not own.is_floating_point():
        return _pair(own, like, is_mixed, (own, partner))
    lam = lam.to(own.dtype)
    if lam.dim() > 0:
        if own.dim() == 0 or own.shape[0] != lam.shape[0]:
            raise RuntimeError(f"'{name}' cannot be mixed with one lam per sample in a compiled training_step.")
        lam = lam.view(-1, *[1] * (own.dim() - 1))  # (N,) -> (N, 1, ...)
    return _pair(lam * own + (1 - lam) * partner, like, True, (own, partner))


def _cross_entropy(
    pair: Pair,
    lam: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    own, partner = _own(pair), _partner(pair)
    return cross_entropy_of_pair(logits, own, partner, lam, weight, ignore_index, reduction, label_smoothing)


def _pair(value: Tensor, like: Pair, is_mixed: bool, halves: tuple[Tensor, Tensor] | None) -> Pair:
    pair = value.as_subclass(type(like))
    pair.value, pair.plan, pair.mixer, pair.is_mixed = value, like.plan, like.mixer, is_mixed
    pair._halves, pair._partner = halves, None if halves is None else halves[1]
    like.mixer.held.append(pair)
    return pair


def _own(pair: Pair) -> Tensor:
    if pair._halves is None and pair.is_mixed:
        raise RuntimeError("The mean of losses with one lam per sample cannot be transformed further.")
    return pair.value if pair._halves is None else pair._halves[0]


def _partner(pair: Pair) -> Tensor:
    if pair._partner is None:
        return pair.value.index_select(0, pair.plan.partner)
    return pair._partner
