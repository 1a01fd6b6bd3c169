"""HOW? The interpolation of rows with their partners, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.mixup.plan import MixPlan

__all__ = ["linear", "mix"]


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
    # Written from own to partner, because the result takes the memory format of lerp's first argument.
    return torch.lerp(own, partner, 1 - _weight(lam, own))


def mix(hidden: Tensor, plan: MixPlan) -> Tensor:
    """Mix a batch of hidden states as planned: ``lam * hidden + (1 - lam) * hidden[partner]``.

    Step 3 of Verma et al. (2019). The gradient is exact, and deterministic on every device: for a permutation it is
    a gather by the inverse permutation, not a sum over duplicate rows.

    Args:
        hidden: Hidden states or inputs, floating point, (N, ...). Not changed.
        plan: The batch's plan, its tensors on the device of ``hidden``.

    Returns:
        Mixed hidden states, with the shape, dtype, device and memory format of ``hidden``. ``hidden`` itself if the
        plan does not mix.

    Raises:
        TypeError: If ``hidden`` is not floating point.
        ValueError: If ``hidden`` has another number of rows than the plan.
    """
    if not plan.mixes:
        return hidden
    return mix_rows(hidden, plan.lam, plan.partner, plan.inverse)


def mix_rows(hidden: Tensor, lam: Tensor, partner: Tensor, inverse: Tensor | None) -> Tensor:
    """:func:`mix` for the parts of a plan."""
    if not hidden.is_floating_point():
        raise TypeError(
            f"Only floating point hidden states can be mixed, got {hidden.dtype}. Mix after an embedding, not before."
        )
    if hidden.dim() == 0 or hidden.shape[0] != lam.shape[0]:
        raise ValueError(
            f"The plan is for {lam.shape[0]} rows, but the hidden state has shape {tuple(hidden.shape)}. Dimension 0 "
            "of a mixed layer's output must be the batch."
        )
    if inverse is None or torch._C._are_functorch_transforms_active():  # torch.func sees through plain operations
        # Several rows may share a partner. The backward of advanced indexing sums them in a fixed order.
        return linear(hidden, hidden[partner], lam)
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return _gather_and_mix(hidden, lam, partner)
    return _MixPermuted.apply(hidden, lam, partner, inverse)


class _MixPermuted(torch.autograd.Function):
    """``lam * x + (1 - lam) * x[p]`` with the gradient ``lam * g + ((1 - lam) * g)[inverse of p]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lam: Tensor, partner: Tensor, inverse: Tensor) -> Tensor:
        # Not in setup_context: with one, apply() inspects this signature anew in every call.
        ctx.save_for_backward(lam, partner, inverse)
        return _gather_and_mix(hidden, lam, partner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Row j receives lam_j * g_j from itself and (1 - lam_i) * g_i from the row i = inverse[j] it is mixed into.
        lam, partner, inverse = ctx.saved_tensors
        if _is_shared(lam):
            if torch.is_grad_enabled():  # a gradient of the gradient is wanted
                return _MixPermuted.apply(grad, lam, inverse, partner), None, None, None
            return _gather_and_mix(grad, lam, inverse), None, None, None
        into = 1 - _weight(lam[inverse], grad)
        return torch.addcmul(grad * _weight(lam, grad), grad[inverse], into), None, None, None


def _gather_and_mix(rows: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    # empty_like keeps the memory format, and lerp_ in place saves a second buffer.
    out = None if rows.is_contiguous() else torch.empty_like(rows)
    mixed = torch.index_select(rows, 0, partner, out=out)
    return mixed.lerp_(rows, _weight(lam, rows))


def _is_shared(lam: Tensor) -> bool:
    """Whether one number, expanded, serves all rows."""
    return lam.stride(0) == 0


def _weight(lam: Tensor, rows: Tensor) -> Tensor:
    if _is_shared(lam):
        return lam[0].to(rows.dtype)
    return lam.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))  # (N,) -> (N, 1, ..., 1)
