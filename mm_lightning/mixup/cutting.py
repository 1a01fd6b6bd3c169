"""HOW? Interpolations that mix a part of each row only: a box, blocks, tokens, channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_lightning.arguments import check_integer, check_number
from mm_lightning.mixup.batch import check_leaf_name, leaf_named
from mm_lightning.mixup.interpolation import mix_part
from mm_lightning.mixup.noise import uniform
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.seen import BATCH

__all__ = ["ChannelMix", "CutMix", "PatchUp", "TokenMix"]

Mixed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CutMix:
    """Puts a box of the partner's into each row (Yun et al., ICCV 2019); at a hidden layer, a box of its feature maps.

    The box has the share ``1 - lam`` of the area, its sides are those of the map times ``sqrt(1 - lam)``, its centre is
    anywhere and what sticks out is cut off (algorithm A1). The weight of the row itself is the share of the area that
    is left of it, counted. With a ``lam`` per row each has a box of its own.

    It mixes images, feature maps and volumes, (N, C, H, W) and (N, C, D, H, W); of these the side is the cube root.
    """

    def problem_with(self, shape: tuple[int, ...]) -> str:
        """Why hidden states of a shape cannot be mixed; empty if they can."""
        return "" if len(shape) in (4, 5) else "it cuts boxes out of (N, C, H, W) or (N, C, D, H, W)"

    def __call__(self, hidden: Tensor, plan: MixPlan) -> Mixed:
        """Mix hidden states.

        Args:
            hidden: Feature maps, floating point, (N, C, H, W) or (N, C, D, H, W).
            plan: The plan.

        Returns:
            Mixed ones, and the weight of the row itself, (N,).

        Raises:
            ValueError: If ``hidden`` has another number of dimensions.
        """
        _check(self, hidden)
        sides = hidden.shape[2:]
        boxes = _distinct(plan.lam)  # (B,)
        share = (1 - boxes) ** (1 / len(sides))
        assert plan.seed is not None
        centres = uniform(plan.seed, (len(boxes), len(sides)), hidden.device)
        inside: Tensor | None = None
        for dim, side in enumerate(sides):
            # Of the drawn side half is to the left of the centre and half to the right, both rounded down.
            half = ((side * share).floor() / 2).floor()
            centre = (centres[:, dim] * side).floor()
            places = torch.arange(side, device=hidden.device)
            along = (places >= (centre - half)[:, None]) & (places < (centre + half)[:, None])  # (B, side)
            along = along.view(-1, 1, *[side if other == dim else 1 for other in range(len(sides))])
            inside = along if inside is None else inside & along
        assert inside is not None
        return _partly(hidden, plan, inside, lam_inside=0.0)


@dataclass(frozen=True)
class PatchUp:
    """Mixes blocks of feature maps, elsewhere in each channel, and leaves the rest (Faramarzi et al., AAAI 2022).

    Blocks begin at random places with the probability
    ``gamma * (H * W) / (size**2 * (H - size + 1) * (W - size + 1))``. Inside of them rows are mixed linearly with
    ``lam``: that is Soft PatchUp. With ``lam = 0``, by ``ratio=FixedRatio(0.0)``, the partner's blocks replace those of
    the row: Hard PatchUp. The weight of the row itself is ``p + (1 - p) * lam``, where p is the share of what is in no
    block, counted.

    Args:
        gamma: Strength, in (0, 1]: about the share of features that is altered while blocks do not overlap.
        block_size: Side of the blocks, odd, >= 1; the largest odd number that fits into smaller maps.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If one is of a wrong type.
    """

    gamma: float = 0.5
    block_size: int = 7

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, "a number in (0, 1]", lambda g: 0 < g <= 1, "The paper uses 0.5 and more.")
        way_out = "The paper uses 7, and 3 or 5 deep in the network."
        check_integer("block_size", self.block_size, "an odd integer >= 1", lambda n: n >= 1 and n % 2 == 1, way_out)

    def problem_with(self, shape: tuple[int, ...]) -> str:
        """Why hidden states of a shape cannot be mixed; empty if they can."""
        return "" if len(shape) == 4 else "it mixes blocks of feature maps (N, C, H, W)"

    def __call__(self, hidden: Tensor, plan: MixPlan) -> Mixed:
        """Mix hidden states, as :meth:`CutMix.__call__`, of (N, C, H, W)."""
        _check(self, hidden)
        height, width = hidden.shape[2:]
        size = min(self.block_size, height, width)
        size -= 1 - size % 2
        places = size**2 * (height - size + 1) * (width - size + 1)
        assert plan.seed is not None
        begins = uniform(plan.seed, hidden.shape[1:], hidden.device) < self.gamma * height * width / places
        blocks = F.max_pool2d(begins[None].float(), size, stride=1, padding=size // 2)  # (1, C, H, W)
        return _partly(hidden, plan, blocks > 0)


@dataclass(frozen=True)
class TokenMix:
    """Takes each token of a sequence from the row itself with the probability ``lam``, else from its partner.

    The tokens are the same in all rows of a batch with one ``lam``. The weight of the row itself is the share of its
    tokens, counted; with a mask, of those that are no padding, in each row. Masks that later modules are handed move
    along: each token keeps its own.

    Args:
        mask: Where in the batch the mask of real tokens is, (N, T), such as ``"attention_mask"``; None counts all.

    Raises:
        TypeError: If ``mask`` is no name.
    """

    mask: str | int | None = None

    def __post_init__(self) -> None:
        if self.mask is not None:
            check_leaf_name("mask", self.mask, "None counts all tokens.")

    @property
    def per_sample(self) -> bool:
        """Whether every row has a weight of its own."""
        return self.mask is not None

    @property
    def asks_for(self) -> tuple[str, ...]:
        """What it must see."""
        return () if self.mask is None else (BATCH,)

    def problem_with(self, shape: tuple[int, ...]) -> str:
        """Why hidden states of a shape cannot be mixed; empty if they can."""
        return "" if len(shape) == 3 else "it exchanges tokens of (N, T, D)"

    def __call__(self, hidden: Tensor, plan: MixPlan, batch: Any = None) -> Mixed:
        """Mix hidden states.

        Args:
            hidden: Embedded tokens, (N, T, D).
            plan: The plan.
            batch: The batch, for its mask.

        Returns:
            Mixed ones, and the weight of the row itself, (N,).

        Raises:
            ValueError: If ``hidden`` has another number of dimensions, or the mask is not (N, T).
        """
        _check(self, hidden)
        taken = self._taken(hidden.shape[1], plan)
        mixed, lam = _partly(hidden, plan, taken[:, :, None], lam_inside=0.0)
        if self.mask is None:
            return mixed, lam
        real = torch.as_tensor(leaf_named(batch, self.mask, "mask"), device=hidden.device)
        if real.shape != hidden.shape[:2]:
            raise ValueError(
                f"mask={self.mask!r} must be (N, T) = {tuple(hidden.shape[:2])} at this layer, got {tuple(real.shape)}."
            )
        real = real.to(lam.dtype)
        own, partner = (real * ~taken).sum(dim=1), (real[plan.partner] * taken).sum(dim=1)
        return mixed, torch.where(own + partner > 0, own / (own + partner).clamp_min(1), lam)

    def mix_mask(self, own: Tensor, partner: Tensor, plan: MixPlan, mixed: tuple[int, ...]) -> Tensor | None:
        """The mask of mixed rows; None if it is of another number of tokens than was mixed, as with one put in front.

        Args:
            own: Masks of the rows, (N, G, ..., T), with any number of ones behind: (N, 1, T, 1), say.
            partner: Those of the partners.
            plan: The plan.
            mixed: Shape of the hidden states that were mixed, (N, T, D), if known.
        """
        dim = next((dim for dim in range(own.dim() - 1, 1, -1) if own.shape[dim] > 1), own.dim() - 1)
        if mixed and own.shape[dim] != mixed[1]:
            return None
        taken = self._taken(own.shape[dim], plan)
        return torch.where(taken.view(-1, *[1] * (dim - 1), own.shape[dim], *[1] * (own.dim() - 1 - dim)), partner, own)

    def _taken(self, tokens: int, plan: MixPlan) -> Tensor:
        """Which tokens are the partner's, (1, T) or (N, T)."""
        return _exchanged(tokens, plan, plan.partner.device)


@dataclass(frozen=True)
class ChannelMix:
    """Takes each channel from the row itself with the probability ``lam``, else from its partner.

    The channels are the same in all rows of a batch with one ``lam``. The weight of the row itself is the share of its
    channels, counted.

    Args:
        dim: Dimension of the channels: 1 of feature maps and vectors, -1 of sequences (N, T, D).

    Raises:
        ValueError: If it is 0, which is that of the batch.
        TypeError: If it is no integer.
    """

    dim: int = 1

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, "an integer other than 0", lambda dim: dim != 0, "0 is the batch.")

    def problem_with(self, shape: tuple[int, ...]) -> str:
        """Why hidden states of a shape cannot be mixed; empty if they can."""
        return "" if len(shape) > max(1, self.dim, -self.dim) else f"it exchanges channels of dimension {self.dim}"

    def __call__(self, hidden: Tensor, plan: MixPlan) -> Mixed:
        """Mix hidden states, as :meth:`CutMix.__call__`, of (N, C, ...)."""
        _check(self, hidden)
        taken = _exchanged(hidden.shape[self.dim], plan, hidden.device)
        shape = [1] * hidden.dim()
        shape[0], shape[self.dim] = taken.shape
        return _partly(hidden, plan, taken.view(shape), lam_inside=0.0)


def _partly(hidden: Tensor, plan: MixPlan, inside: Tensor, lam_inside: float | None = None) -> Mixed:
    """Mix where ``inside`` is true, with the plan's ``lam`` or another, and count what is left of the row itself.

    Args:
        hidden: (N, ...).
        plan: The plan.
        inside: Of as many dimensions, with 1 row for all or N.
        lam_inside: Weight of the row itself inside; None is ``lam``.
    """
    precise = torch.promote_types(hidden.real.dtype if hidden.is_complex() else hidden.dtype, torch.float32)
    part = inside.flatten(1).to(precise).mean(dim=1)  # (1,) or (N,)
    lam = 1 - part * (1 - (_distinct(plan.lam).to(precise) if lam_inside is None else lam_inside))
    return mix_part(hidden, plan, inside, lam_inside), lam.expand(len(hidden))


def _exchanged(places: int, plan: MixPlan, device: torch.device) -> Tensor:
    """Places that are the partner's, each with the probability ``1 - lam``, (1, places), or (N, places) of many lam."""
    assert plan.seed is not None
    return uniform(plan.seed, (places,), device) >= _distinct(plan.lam)[:, None]


def _distinct(lam: Tensor) -> Tensor:
    """``lam`` (N,); (1,) where all rows share one."""
    return lam[:1] if lam.stride(0) == 0 else lam


def _check(interpolation: Any, hidden: Tensor) -> None:
    if problem := interpolation.problem_with(tuple(hidden.shape)):
        raise ValueError(f"{interpolation!r} cannot mix hidden states of shape {tuple(hidden.shape)}: {problem}.")
