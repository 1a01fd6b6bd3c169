"""Rows of outputs and their targets: in the form that numbers are computed from, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "check_targets", "checked", "class_logits"]

IGNORED = -100  # what torch's cross_entropy leaves out


def checked(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states (N, D) and targets (N,) on the CPU.

    Raises:
        ValueError: If the shapes do not fit, there are no rows or a value is not finite.
    """
    if hidden.ndim != 2 or not len(hidden) or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"hidden must be (N, D) and targets (N,), with N >= 1, got {shapes}.")
    if wrong := int((~hidden.isfinite()).sum()):
        raise ValueError(f"hidden must be finite, got {wrong} of {hidden.numel()} values that are not.")
    return hidden.detach().cpu(), targets.detach().cpu()


def check_targets(targets: Tensor, classes: int, may_be_ignored: bool = True) -> None:
    """Refuse targets that are of no class.

    Args:
        targets: Class indices, integer, (N,).
        classes: K.
        may_be_ignored: Whether rows may have the target -100.

    Raises:
        ValueError: If a target is not in [0, K).
    """
    known = targets[targets != IGNORED] if may_be_ignored else targets
    if len(known) and not 0 <= known.min() <= known.max() < classes:
        ends = f"{known.min()} to {known.max()}"
        raise ValueError(
            f"targets must be in [0, {classes}), got {ends}: count from 0, and give logits of all classes."
        )


def class_logits(outputs: Any, rows: int, probabilities: bool = False) -> Tensor:
    """Return a network's outputs as logits of two classes or more, in float32 or better.

    Args:
        outputs: Logits (rows, K), or the one logit of class 1 against class 0, (rows,) or (rows, 1).
        rows: Number of rows expected.
        probabilities: Whether the outputs are probabilities; their logarithms are then the logits.

    Returns:
        (rows, K) with K >= 2; their softmax are the probabilities.

    Raises:
        TypeError: If the outputs are no floating point tensor.
        ValueError: If their shape is another one, or they should be probabilities and are none.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"forward must return logits, a floating point tensor, got {kind}. Pass forward=....")
    if outputs.ndim not in (1, 2) or len(outputs) != rows or not outputs.numel():
        raise ValueError(
            f"forward must return logits ({rows}, K) for {rows} inputs, got shape {tuple(outputs.shape)}. "
            "Pass forward=(module, inputs) -> logits."
        )
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(rows, -1)
    if probabilities:
        if outputs.shape[1] == 1:
            outputs = torch.cat([1 - outputs, outputs], dim=1)
        off, least = (outputs.detach().sum(dim=1) - 1).abs().max().item(), outputs.detach().min().item()
        if least < 0 or off > 0.02:  # as far as bfloat16 may be off
            raise ValueError(f"Outputs must be probabilities, got {least:.3g} and a sum {off:.3g} away from 1.")
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
    return torch.cat([torch.zeros_like(outputs), outputs], dim=1) if outputs.shape[1] == 1 else outputs
