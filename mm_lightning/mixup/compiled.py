"""A call on pairs while ``torch.compile`` traces it: both halves at once, in operations that trace without a break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_lightning.mixup.expression import is_in_place, is_linear, is_random
from mm_lightning.mixup.pair import Pair, value_of
from mm_lightning.mixup.targets import cross_entropy_of_pair

__all__ = ["compiled_call"]


def compiled_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Both halves of a call, in few and plain operations."""
    name = getattr(func, "__name__", str(func))
    first, *_ = pairs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pair)]
    if is_in_place(name, kwargs) or is_random(name):
        raise RuntimeError(f"'{name}' on the batch's targets cannot be followed in a compiled training_step.")
    if all(pair.is_mixed for pair in pairs) and is_linear(name, pairs, args):
        value = func(*tree_map_only(Pair, value_of, args), **tree_map_only(Pair, value_of, kwargs))
        if first.plan.lam.stride(0) != 0:
            return _compiled_pair(value, first, True, None)
    own = func(*tree_map_only(Pair, _compiled_own, args), **tree_map_only(Pair, _compiled_own, kwargs))
    if not isinstance(own, Tensor):
        return own
    if own.requires_grad and (first.mixer.is_explicit or not first.mixer.has_mixed):
        return own
    partner = func(*tree_map_only(Pair, _compiled_partner, args), **tree_map_only(Pair, _compiled_partner, kwargs))
    if not own.requires_grad and not any(pair.is_mixed for pair in pairs):
        return _compiled_pair(own, first, False, (own, partner))
    first.mixer.losses.append(name)
    lam = first.plan.lam[0] if first.plan.lam.stride(0) == 0 else first.plan.lam
    if lam.dim() == 0:
        return _compiled_pair(lam.to(own.dtype) * own + (1 - lam.to(own.dtype)) * partner, first, True, (own, partner))
    if func is F.cross_entropy and len(pairs) == 1:
        return _compiled_pair(_compiled_cross_entropy(first, lam, *args, **kwargs), first, True, None)
    if own.dim() == 0 or own.shape[0] != lam.shape[0]:
        raise RuntimeError(f"'{name}' cannot be mixed with one lam per sample in a compiled training_step.")
    lam = lam.to(own.dtype).view(-1, *[1] * (own.dim() - 1))  # (N,) -> (N, 1, ...)
    return _compiled_pair(lam * own + (1 - lam) * partner, first, True, (own, partner))


def _compiled_cross_entropy(
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
    own, partner = _compiled_own(pair), _compiled_partner(pair)
    return cross_entropy_of_pair(logits, own, partner, lam, weight, ignore_index, reduction, label_smoothing)


def _compiled_pair(value: Tensor, like: Pair, is_mixed: bool, halves: tuple[Tensor, Tensor] | None) -> Pair:
    pair = value.as_subclass(type(like))
    pair.value, pair.plan, pair.mixer, pair.is_mixed = value, like.plan, like.mixer, is_mixed
    pair._halves, pair._partner = halves, None if halves is None else halves[1]
    return pair


def _compiled_own(pair: Pair) -> Tensor:
    if pair._halves is None and pair.is_mixed:
        raise RuntimeError("The mean of losses with one lam per sample cannot be transformed further.")
    return pair.value if pair._halves is None else pair._halves[0]


def _compiled_partner(pair: Pair) -> Tensor:
    if pair._partner is None:
        return pair.value.index_select(0, pair.plan.partner)
    return pair._partner
