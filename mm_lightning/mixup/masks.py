"""Masks of padded sequences: a row mixed from two has the tokens of both, from the mixed layer on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.mixup.layers import INPUT, Layer
from mm_lightning.mixup.plan import MixPlan

__all__ = ["MaskSite", "keep_value", "sites_after", "union"]

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
        begin: When the module began to run, on the clock of the trace.
        end: When it ended.
    """

    name: str
    key: int | str
    keep: bool
    begin: int
    end: int


def sites_after(
    layer: Layer, sites: Sequence[MaskSite], ends: Mapping[str, int], names: Sequence[str]
) -> list[MaskSite]:
    """The outermost sites that run after a layer.

    Args:
        layer: The mixed layer.
        sites: All sites.
        ends: When each module ended.
        names: Names of the layer's modules; none for the batch itself.
    """
    end = max((ends[name] for name in names if name in ends), default=-1)
    if layer.name != INPUT and end < 0:
        return []
    after = [site for site in sites if site.begin > end]
    return [
        site
        for site in after
        if not any(other.begin < site.begin and site.end < other.end for other in after if other.name != site.name)
    ]


def union(mask: Tensor, partner: Tensor, keep: bool) -> Tensor:
    """Keep what either row keeps.

    Args:
        mask: Booleans, integers or floating point numbers, (N, ...), or (N * heads, ...).
        partner: Each row's partner, (N,).
        keep: The value that keeps a token, for booleans and integers.

    Returns:
        The mask for the mixed rows; ``mask`` itself if it has no row for each row of the batch.
    """
    rows = len(partner)
    if mask.dim() == 0 or mask.shape[0] % rows:
        return mask
    grouped = mask.view(rows, -1, *mask.shape[1:])
    of_partner = grouped.index_select(0, partner.to(mask.device))
    keeps_larger = keep or mask.is_floating_point()
    if mask.dtype == torch.bool:
        both = grouped | of_partner if keeps_larger else grouped & of_partner
    else:
        both = torch.maximum(grouped, of_partner) if keeps_larger else torch.minimum(grouped, of_partner)
    return both.view(mask.shape)


def keep_value(mask: Tensor, module: nn.Module, key: int | str) -> bool:
    """Tell which value of a boolean or integer mask keeps a token.

    Sequences are padded at one end, so that at the other end every row is kept. If no row of the batch is padded, the
    name of the argument tells: PyTorch's attention and everything called padding mark what is left out, other masks
    mark what is kept.
    """
    if not mask.is_floating_point():
        first, last = mask[..., 0], mask[..., -1]
        for end, other in ((first, last), (last, first)):
            value = end.flatten()[0]
            if bool((end == value).all()) and bool((other != value).any()):
                return bool(value)
    names = list(inspect.signature(module.forward).parameters)
    name = key if isinstance(key, str) else (names[key] if key < len(names) else "")
    return not ("pad" in name or isinstance(module, _TORCH_ATTENTION))


class UnionHook:
    """A pre-hook that hands a module the union of masks while certain layers are mixed."""

    def __init__(self, sites: Mapping[int, Sequence[MaskSite]]) -> None:
        self.sites = dict(sites)
        self.plan: MixPlan | None = None
        self.active: Sequence[MaskSite] = ()

    def switch_on(self, layer: int, plan: MixPlan) -> None:
        """Take the unions that belong to the layer of this index."""
        self.active = self.sites.get(layer, ())
        self.plan = plan if self.active else None

    def __deepcopy__(self, memo: Any) -> UnionHook:
        return UnionHook({})

    def __reduce__(self) -> Any:
        return UnionHook, ({},)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the masks if the planned layer has been mixed before this module."""
        if self.plan is None:
            return None
        positional, named = list(args), dict(kwargs)
        for site in self.active:
            holder: Any = named if isinstance(site.key, str) else positional
            mask = holder[site.key] if isinstance(site.key, int) else holder.get(site.key)
            if isinstance(mask, Tensor):
                holder[site.key] = union(mask, self.plan.partner, site.keep)
        return tuple(positional), named
