"""Masks of padded sequences: a row mixed from two has the tokens of both, from the mixed layer on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.mixup.layers import Hook
from mm_lightning.mixup.mixing import Mixing
from mm_lightning.mixup.plan import MixPlan

__all__ = ["MaskSite", "UnionHook", "keep_value", "masks_in", "union"]

_TORCH_ATTENTION = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)


@dataclass(frozen=True)
class MaskSite:
    """An argument in which a module was seen to take a mask of the batch.

    Attributes:
        name: Name of the module.
        key: Position of the argument, or its keyword.
        keep: For booleans and integers the value that keeps a token. Floating point masks keep the larger value, be it
            0 against minus infinity or 1 against 0.
    """

    name: str
    key: int | str
    keep: bool


def masks_in(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    selects: Callable[[Tensor], bool],
) -> list[MaskSite]:
    """Arguments in which a module is handed masks of the batch beside hidden states.

    Args:
        name: The module's name.
        module: The module.
        args: Its arguments.
        kwargs: Its keyword arguments.
        selects: Whether a tensor was made of the batch to select or scale, and carries no values.
    """
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(key, item) for key, item in items if isinstance(item, Tensor)]
    masks = [(key, tensor) for key, tensor in tensors if tensor.dim() > 1 and selects(tensor)]
    if not any(tensor.is_floating_point() and all(tensor is not mask for _, mask in masks) for _, tensor in tensors):
        return []
    kept = [(key, keep_value(mask, module, key)) for key, mask in masks if _has_two_values(mask, module, key)]
    return [MaskSite(name, key, keep) for key, keep in kept if keep is not None]


def union(mask: Tensor, plan: MixPlan, keep: bool, mixed: tuple[int, ...] = ()) -> Tensor:
    """Keep what either row keeps; where the interpolation exchanges tokens, what the row keeps that each is from.

    Args:
        mask: Booleans, integers or floating point numbers, (N, ...), or (N * heads, T, T).
        plan: The plan; of an interpolation that has it, ``mix_mask`` tells the mask of mixed rows, if it fits them.
        keep: The value that keeps a token, for booleans and integers.
        mixed: Shape of what was mixed.

    Returns:
        The mask for the mixed rows; ``mask`` itself if it has no row for each row of the batch.
    """
    rows = plan.batch_size
    if mask.dim() == 0 or (mask.shape[0] != rows and (mask.dim() != 3 or mask.shape[0] % rows)):
        return mask
    grouped = mask.view(rows, -1, *mask.shape[1:])
    of_partner = grouped.index_select(0, plan.partner)
    keeps_larger = keep or mask.is_floating_point()
    mix_mask = getattr(plan.interpolation, "mix_mask", None)
    both = None if mix_mask is None else mix_mask(grouped, of_partner, plan, mixed)
    if both is not None:
        return both.view(mask.shape)
    if mask.dtype == torch.bool:
        both = grouped | of_partner if keeps_larger else grouped & of_partner
    else:
        both = torch.maximum(grouped, of_partner) if keeps_larger else torch.minimum(grouped, of_partner)
    return both.view(mask.shape)


def _has_two_values(tensor: Tensor, module: nn.Module, key: int | str) -> bool:
    """Whether a tensor made of integers is a mask, not indices: it has two values, and integers are called so."""
    if tensor.dtype == torch.bool:
        return True
    if not tensor.is_floating_point() and "mask" not in _argument(module, key):
        return False
    return len(tensor.unique()) <= 2


def keep_value(mask: Tensor, module: nn.Module, key: int | str) -> bool | None:
    """Tell which value of a boolean or integer mask keeps a token.

    The name of the argument tells, where it has a convention: padding and the masks of PyTorch's attention mark what is
    left out, attention masks elsewhere what is kept. Otherwise the padding itself tells: it is at one end of the
    sequences, so that every row is kept at the other.

    Returns:
        The value; None if it cannot be told.
    """
    name = _argument(module, key)
    if mask.is_floating_point():
        return True
    if "pad" in name or isinstance(module, _TORCH_ATTENTION):
        return False
    if "attention_mask" in name or "attn_mask" in name:
        return True
    first, last = mask[..., 0].flatten(), mask[..., -1].flatten()
    is_first_constant, is_last_constant = bool((first == first[0]).all()), bool((last == last[0]).all())
    if is_first_constant != is_last_constant:
        return bool(first[0]) if is_first_constant else bool(last[0])
    return None


def _argument(module: nn.Module, key: int | str) -> str:
    names = list(inspect.signature(module.forward).parameters)
    return key if isinstance(key, str) else (names[key] if key < len(names) else "")


class UnionHook(Hook):
    """A pre-hook that hands a module the union of masks while certain layers are mixed."""

    def __init__(self, sites: Mapping[int, Sequence[MaskSite]]) -> None:
        self.sites = dict(sites)
        self.mixing: Mixing | None = None
        self.active: Sequence[MaskSite] = ()

    def switch_on(self, layer: int, mixing: Mixing) -> None:
        """Take the unions that belong to the layer of this index."""
        self.active = self.sites.get(layer, ())
        self.mixing = mixing if self.active else None

    def __deepcopy__(self, memo: Any) -> UnionHook:
        return UnionHook({})

    def __reduce__(self) -> Any:
        return UnionHook, ({},)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the masks if the planned layer has been mixed before this module."""
        if self.mixing is None:
            return None
        positional, named = list(args), dict(kwargs)
        for site in self.active:
            holder: Any = named if isinstance(site.key, str) else positional
            mask = holder[site.key] if isinstance(site.key, int) else holder.get(site.key)
            if isinstance(mask, Tensor):
                holder[site.key] = union(mask, self.mixing.plan, site.keep, self.mixing.shape)
        return tuple(positional), named
