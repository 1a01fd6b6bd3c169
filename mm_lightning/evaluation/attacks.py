"""Attacks: the change of each input, small in the maximum norm, that raises the loss of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning.arguments import check_count, check_flag, check_number
from mm_lightning.evaluation.bounds import InputBounds
from mm_lightning.evaluation.modes import evaluating
from mm_lightning.evaluation.rows import IGNORED, check_targets, class_logits

__all__ = ["FGSM", "PGD"]

Network = Callable[[Tensor], Any]


@dataclass(frozen=True)
class FGSM:
    """The fast gradient sign method: ``x + epsilon * sign(gradient of the loss by x)`` (Goodfellow et al. 2015).

    The attack of table 7 of Verma et al. (2019). Computed in evaluation mode, with gradients by the inputs alone: those
    of parameters, modes and ``requires_grad`` stay as they were. It works inside ``torch.no_grad`` and
    ``torch.inference_mode``.

    Attributes:
        epsilon: Largest change, >= 0, in the unit of the bounds: of pixels in [0, 1], 8/255 is usual on CIFAR.
    """

    epsilon: float = 8 / 255

    def __post_init__(self) -> None:
        """Refuse an epsilon that is none."""
        _check_distance("epsilon", self.epsilon)

    @property
    def name(self) -> str:
        """In log keys."""
        return f"fgsm_{self.epsilon:.3g}"

    def __call__(
        self, network: Network, inputs: Tensor, targets: Tensor, bounds: InputBounds, rng: torch.Generator | None = None
    ) -> Tensor:
        """Return the attacked inputs.

        Args:
            network: Module or function that gives the logits (N, K), or (N,) or (N, 1) for two classes, of inputs.
            inputs: Floating point, (N, ...). Not changed.
            targets: Class indices, integer, in [0, K), (N,). Rows of -100, which torch's losses ignore, stay.
            bounds: Of the inputs.
            rng: Not used; nothing is drawn.

        Raises:
            RuntimeError: If the logits cannot be differentiated by the inputs.
            TypeError: If there are no logits.
            ValueError: If logits or targets are of another shape, or a target is of no class.
        """
        with torch.inference_mode(False):
            origin, bounds = inputs.detach().clone(), bounds.to(inputs)
            step = self.epsilon * bounds.unit * _direction(network, origin, targets)
            return bounds.clip(origin + step, origin)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent: steps of :class:`FGSM`, each brought back to within epsilon (Madry et al. 2018).

    It begins at a random place within epsilon, which an own generator draws, never the global one.

    Attributes:
        epsilon: Largest change, >= 0, in the unit of the bounds.
        step_size: Of one step, in the same unit.
        steps: How many; 0 leaves the random place.
        random_start: Whether to begin at a random place, not at the input.
    """

    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _check_distance("epsilon", self.epsilon)
        _check_distance("step_size", self.step_size)
        check_count("steps", self.steps, 0, "10 are usual.")
        check_flag("random_start", self.random_start, "False begins at the input.")

    @property
    def name(self) -> str:
        """In log keys."""
        return f"pgd_{self.epsilon:.3g}"

    def __call__(
        self, network: Network, inputs: Tensor, targets: Tensor, bounds: InputBounds, rng: torch.Generator | None = None
    ) -> Tensor:
        """Return the attacked inputs.

        Args:
            network: As for :class:`FGSM`.
            inputs: As for :class:`FGSM`.
            targets: As for :class:`FGSM`.
            bounds: As for :class:`FGSM`.
            rng: Draws the places to begin at, on the CPU; default is one with the seed 0.

        Returns:
            The inputs after the last step, which need not be the one with the largest loss.

        Raises:
            RuntimeError: As for :class:`FGSM`; so for TypeError and ValueError.
        """
        with torch.inference_mode(False):
            origin, bounds = inputs.detach().clone(), bounds.to(inputs)
            reach, step = self.epsilon * bounds.unit, self.step_size * bounds.unit
            attacked = origin
            if self.random_start:
                rng = torch.Generator().manual_seed(0) if rng is None else rng
                draw = 2 * torch.rand(origin.shape, generator=rng, dtype=torch.float64).to(origin) - 1
                attacked = bounds.clip(origin + reach * draw, origin)
            for _ in range(self.steps):
                moved = attacked + step * _direction(network, attacked, targets)
                attacked = bounds.clip(torch.clamp(moved, origin - reach, origin + reach), origin)
            return attacked


def _direction(network: Network, inputs: Tensor, targets: Tensor) -> Tensor:
    """The sign of the gradient of each row's cross-entropy by its input."""
    mode = evaluating(network) if isinstance(network, nn.Module) else nullcontext()
    with torch.enable_grad(), mode:
        place = inputs.detach().clone().requires_grad_()
        logits = class_logits(network(place), len(place))
        slopes = _slopes(logits.detach(), targets.clone())
        gradient = None
        if logits.requires_grad:
            # of the sum: a row's gradient does not depend on how many others there are
            (gradient,) = torch.autograd.grad(logits, place, slopes, allow_unused=True)
    if gradient is None:
        raise RuntimeError(
            "The logits cannot be differentiated by the inputs: the network runs without gradients, or on something "
            "else. Remove its no_grad, or pass forward=(module, batch) -> anything, which runs it on them."
        )
    return gradient.sign()


def _slopes(logits: Tensor, targets: Tensor) -> Tensor:
    """The derivative of each row's cross-entropy by its logits, divided by 1 - p of the target, (N, K).

    The derivative is p - one-hot = (1 - p_target) (q - one-hot), with q the softmax of the other classes. The first
    factor changes no sign; but where a network is sure of the target it is rounded away, and with it the other classes:
    in float32 some signs are wrong from a p of 1 - 1e-6 on, in float16 nothing is left.
    """
    if targets.shape != logits.shape[:1] or targets.is_floating_point():
        got = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets must be integer ({len(logits)},), a class for each input, got {got}.")
    check_targets(targets, logits.shape[1])
    is_target = F.one_hot(targets.long().clamp(min=0), logits.shape[1]).bool()
    slopes = logits.masked_fill(is_target, -math.inf).softmax(dim=1) - is_target.to(logits)
    return slopes.masked_fill((targets == IGNORED)[:, None], 0.0)


def _check_distance(name: str, value: Any) -> None:
    check_number(name, value, "a number >= 0", lambda number: number >= 0, "0 changes nothing.")
