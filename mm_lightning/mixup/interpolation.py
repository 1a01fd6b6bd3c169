"""HOW? The interpolation of rows with their partners, forward and backward."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mm_lightning.mixup.plan import MixPlan

__all__ = ["linear", "mix", "mix_part", "mix_rows"]

# From this number of elements on one pass over memory pays for the table of rows that it needs.
_MANY = 2**20
_SUMMED_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)  # the types of the kernel that does one pass
_NARROW = 64  # elements of a row below which the table is not small beside the rows
_SEGMENT = 4096  # elements of a piece of a row: two of them, and their sum, stay in the first level of the cache


def linear(own: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """Mix each row with its partner: ``lam * own + (1 - lam) * partner``.

    This is Mix_lambda of Verma et al. (2019), equation 1.

    Args:
        own: Hidden states or one-hot targets, floating point, (N, ...).
        partner: The rows mixed in, same shape as ``own``.
        lam: Weight of ``own``, in [0, 1], (N,).

    Returns:
        Mixed rows, with the shape, dtype and device of ``own``.

    Raises:
        ValueError: If the shapes differ or ``lam`` is not (N,).

    Example:
        >>> linear(torch.tensor([[1.0]]), torch.tensor([[3.0]]), lam=torch.tensor([0.25]))
        tensor([[2.5000]])
    """
    if own.shape != partner.shape:
        raise ValueError(f"own and partner must have one shape, got {tuple(own.shape)} and {tuple(partner.shape)}.")
    if own.dim() == 0 or lam.shape != own.shape[:1]:
        raise ValueError(f"lam must be (N,) for rows (N, ...), got {tuple(lam.shape)} for {tuple(own.shape)}.")
    # Not lerp, whose difference of two infinite rows is no number. The result has the memory format of ``own``.
    return _between(own, partner, lam)


def mix(hidden: Tensor, plan: MixPlan) -> Tensor:
    """Mix a batch of hidden states as planned: ``lam * hidden + (1 - lam) * hidden[partner]``.

    Step 3 of Verma et al. (2019). The gradient is exact, and deterministic on every device: for a permutation it is
    a gather by the inverse permutation, not a sum over duplicate rows.

    The result is the only large tensor that is made, forward and backward alike; autograd keeps the plan's tensors of
    N numbers, and no hidden state.

    Args:
        hidden: Hidden states or inputs, floating point or complex, (N, ...). Not changed.
        plan: The batch's plan, its tensors on the device of ``hidden``.

    Returns:
        Mixed hidden states, with the shape, dtype, device and memory format of ``hidden``. ``hidden`` itself if the
        plan does not mix.

    Raises:
        TypeError: If ``hidden`` holds integers.
        ValueError: If ``hidden`` has another number of rows than the plan, or the plan is one for :func:`interpolate`.
    """
    if plan.interpolation is not None or plan.pending is not None:
        raise ValueError(
            "The plan has an interpolation of its own, or draws partners by hidden states, so that the loss needs what "
            "comes of mixing. Use hidden, plan = interpolate(hidden, plan)."
        )
    return mix_rows(hidden, plan) if plan.mixes else hidden


def mix_rows(hidden: Tensor, plan: MixPlan) -> Tensor:
    """:func:`mix` for a plan that mixes. A graph compiled of it is the same for all layers."""
    partner, inverse = _rows_of(hidden, plan)
    if inverse is None or torch._C._are_functorch_transforms_active():  # torch.func sees through plain operations
        # Several rows may share a partner. The backward of advanced indexing sums them in a fixed order.
        return linear(hidden, hidden[partner], plan.lam)
    # A compiled graph would be made anew for every number; it reads the tensor.
    lam = plan.lam if torch.compiler.is_compiling() or plan.shared_lam is None else plan.shared_lam
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return _weighted_sum(hidden, partner, lam)
    return _MixPermuted.apply(hidden, lam, partner, inverse)


def mix_part(hidden: Tensor, plan: MixPlan, inside: Tensor, lam: float | None = None) -> Tensor:
    """Mix a part of each row, and leave the rest as it is.

    Args:
        hidden: Hidden states or inputs, floating point or complex, (N, ...). Not changed.
        plan: The batch's plan, which mixes.
        inside: What is mixed, bool, of as many dimensions as ``hidden``: with 1 row for all, or N.
        lam: Weight of the row itself inside, in [0, 1]; None is the plan's ``lam``.

    Returns:
        Mixed hidden states.

    Raises:
        TypeError: If ``hidden`` holds integers.
        ValueError: If ``hidden`` has another number of rows than the plan.
    """
    partner, inverse = _rows_of(hidden, plan)
    known = None if torch.compiler.is_compiling() else plan.shared_lam
    ratio: Any = lam if lam is not None else plan.lam if known is None else known
    outside = _outside(inside, hidden)
    is_plain = inverse is None or len(inside) > 1 or not _is_shared(ratio)
    if is_plain or torch._C._are_functorch_transforms_active():
        return torch.where(outside, hidden, _between(hidden, hidden[partner], ratio))
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return torch.where(outside, hidden, _weighted_sum(hidden, partner, ratio))
    return _MixPart.apply(hidden, outside, ratio, partner, inverse)


def _outside(inside: Tensor, hidden: Tensor) -> Tensor:
    """What is left as it is, in memory in the order of ``hidden``: what is chosen by it then keeps that, too."""
    part = hidden[tuple(map(slice, inside.shape))]
    return torch.empty_like(part, dtype=torch.bool).copy_(~inside)


def _rows_of(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor | None]:
    """The plan's partners and their inverse, for hidden states that it fits."""
    if not (hidden.is_floating_point() or hidden.is_complex()):
        raise TypeError(
            f"Only floating point hidden states can be mixed, got {hidden.dtype}. Mix after an embedding, not before."
        )
    partner, inverse = plan.partner, plan.inverse
    if hidden.dim() == 0 or not hidden.shape[0] == partner.shape[0] == plan.lam.shape[0]:
        raise ValueError(
            f"The plan is for {plan.lam.shape[0]} rows, but the hidden state has shape {tuple(hidden.shape)}. "
            "Dimension 0 of a mixed layer's output must be the batch."
        )
    return partner, inverse


def _between(own: Tensor, partner: Tensor, lam: Tensor | float) -> Tensor:
    if not isinstance(lam, Tensor) and lam == 0:
        return partner
    weight = _weight(lam, own)
    return own * weight + partner * (1 - weight)


class _MixPermuted(torch.autograd.Function):
    """``lam * x + (1 - lam) * x[p]`` with the gradient ``lam * g + ((1 - lam) * g)[inverse of p]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lam: Tensor | float, partner: Tensor, inverse: Tensor) -> Tensor:
        # Not in setup_context: with one, apply() inspects this signature anew in every call.
        ctx.number = None if isinstance(lam, Tensor) else lam
        ctx.save_for_backward(partner, inverse, lam if isinstance(lam, Tensor) else None)
        return _weighted_sum(hidden, partner, lam)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Row j receives lam_j * g_j from itself and (1 - lam_i) * g_i from the row i = inverse[j] it is mixed into.
        partner, inverse, lam = ctx.saved_tensors
        lam = ctx.number if lam is None else lam
        if not torch.is_grad_enabled():
            return _weighted_sum(grad, inverse, lam, is_backward=True), None, None, None
        if _is_shared(lam):  # a gradient of the gradient is wanted
            return _MixPermuted.apply(grad, lam, inverse, partner), None, None, None
        into = _weight(_complement(lam, grad)[inverse], grad)
        return torch.addcmul(grad * _weight(lam, grad), grad[inverse], into), None, None, None


class _MixPart(torch.autograd.Function):
    """The mix of a part that is the same in all rows: so the gradient of the part is mixed by the inverse."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, outside: Tensor, lam: Tensor | float, partner: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.number = None if isinstance(lam, Tensor) else lam
        ctx.save_for_backward(outside, partner, inverse, lam if isinstance(lam, Tensor) else None)
        return torch.where(outside, hidden, _weighted_sum(hidden, partner, lam))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        outside, partner, inverse, lam = ctx.saved_tensors
        lam = ctx.number if lam is None else lam
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            return _MixPart.apply(grad, outside, lam, inverse, partner), None, None, None, None
        return torch.where(outside, grad, _weighted_sum(grad, inverse, lam, is_backward=True)), None, None, None, None


def _weighted_sum(rows: Tensor, other: Tensor, lam: Tensor | float, is_backward: bool = False) -> Tensor:
    """``lam * rows + (1 - lam) * rows[other]``; in the backward pass ``1 - lam`` is that of the other row."""
    if rows.numel() >= _MANY and not torch.compiler.is_compiling():  # compiled, the lines below are one pass as well
        flat = _rows_in_memory(rows)
        if flat is not None:
            mixed = _sum_in_one_pass(flat, other, lam, is_backward)
            # No view: what a function returns as one may not be changed in place, by nn.ReLU(inplace=True) say.
            return (mixed if flat is rows else mixed.movedim(-1, 1)).detach()
    # empty_like keeps the memory format, and adding in place saves a second buffer.
    out = None if rows.is_contiguous() else torch.empty_like(rows)
    mixed = torch.index_select(rows, 0, other, out=out)
    if not isinstance(lam, Tensor):  # not lerp: its difference of two infinite numbers is no number
        return mixed if lam == 0 else mixed.mul_(1 - lam).add_(rows, alpha=lam)
    complement = _complement(lam, rows)
    complement = complement[other] if is_backward and not _is_shared(lam) else complement
    return mixed.mul_(_weight(complement, rows)).addcmul_(rows, _weight(lam, rows))


def _rows_in_memory(rows: Tensor) -> Tensor | None:
    """The rows with their elements in the order of memory; None if one pass over them is not possible."""
    if type(rows) is not Tensor or rows.device.type != "cpu" or rows.dtype not in _SUMMED_IN_FLOAT32:
        return None
    if rows.numel() < _NARROW * len(rows) or forward_ad.unpack_dual(rows).tangent is not None:
        return None
    if rows.is_contiguous():
        return rows
    channels_last = rows.movedim(1, -1)
    return channels_last if rows.dim() > 3 and channels_last.is_contiguous() else None


def _sum_in_one_pass(rows: Tensor, other: Tensor, lam: Tensor | float, is_backward: bool) -> Tensor:
    """Read both rows and write their sum, as a table of embeddings does it: every row's bag is itself and the other."""
    pieces = _pieces_of(rows.numel() // len(rows))
    own, begins = _bags_of(len(rows), pieces)
    bags = torch.stack((own, torch.add(own[0], other.view(-1, 1), alpha=pieces)), dim=-1)  # (N, pieces, 2)
    if isinstance(lam, Tensor) and not _is_shared(lam):
        both = _rounded(lam, rows.dtype)  # (2, N)
        both = torch.stack((both[0], both[1][other] if is_backward else both[1]), dim=-1)  # (N, 2)
        weights = both.view(-1, 1, 2).expand(bags.shape).reshape(-1)
    else:
        shared = lam[:1] if isinstance(lam, Tensor) else torch.tensor([lam], device="cpu")
        weights = _rounded(shared, rows.dtype).view(2).repeat(own.numel())
    table = rows.detach().view(own.numel(), -1)
    return torch.embedding_bag(table, bags.view(-1), begins, per_sample_weights=weights)[0].view(rows.shape)


def _rounded(lam: Tensor, dtype: torch.dtype) -> Tensor:
    """``lam`` (N,) and ``1 - lam`` in a type, (2, N), with the sum of exactly one."""
    both = torch.stack((lam, 1 - lam))
    if both.dtype == dtype:
        return both
    # In [0.5, 1] the distance to one is a number of the type, too.
    return torch.where(both >= 0.5, both.to(dtype), 1 - both.flip(0).to(dtype))


@functools.lru_cache(maxsize=16)
def _bags_of(rows: int, pieces: int) -> tuple[Tensor, Tensor]:
    """The numbers of the pieces of all rows (N, pieces), and where the bag of each begins."""
    count = rows * pieces
    return torch.arange(count, device="cpu").view(rows, pieces), torch.arange(0, 2 * count, 2, device="cpu")


@functools.lru_cache(maxsize=256)
def _pieces_of(width: int) -> int:
    """Into how many equal pieces of at most ``_SEGMENT`` elements, but not of a few, a row is cut; else into one."""
    smallest = math.ceil(width / _SEGMENT)
    return next((count for count in range(smallest, 8 * smallest + 1) if width % count == 0), 1)


def _is_shared(lam: Tensor | float) -> bool:
    """Whether one number, expanded, serves all rows."""
    return not isinstance(lam, Tensor) or lam.stride(0) == 0


def _complement(lam: Tensor, rows: Tensor) -> Tensor:
    """``1 - lam`` in the more precise of both types."""
    return 1 - lam.to(torch.promote_types(lam.dtype, rows.dtype))


def _weight(lam: Tensor | float, rows: Tensor) -> Any:
    if not isinstance(lam, Tensor):
        return lam
    if _is_shared(lam):
        return lam[0].to(rows.dtype)
    return lam.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))  # (N,) -> (N, 1, ..., 1)
