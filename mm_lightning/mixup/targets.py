"""Mixed targets: their cross-entropy, accuracy and entropy.

The loss is ``lam * loss(logits, targets) + (1 - lam) * loss(logits, targets[partner])``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_lightning.mixup.interpolation import linear
from mm_lightning.mixup.mixing import Mixing
from mm_lightning.mixup.plan import MixPlan

__all__ = ["cross_entropy_of_pair", "halves", "mixed_accuracy", "mixed_cross_entropy", "mixed_target_entropy"]

_MANY = 2**18  # scores from which on a second gradient of their size costs more than the calls that spare it


def mixed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    plan: MixPlan,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of a batch that was mixed as planned.

    Equals ``lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[partner])`` with the
    same options, each term with its own normaliser, for one log-softmax. With a ``lam`` per row, row i's losses are
    weighted by ``lam[i]`` and ``1 - lam[i]`` before the reduction. Without class weights this is the cross-entropy on
    mixed one-hot targets (Verma et al., 2019, equation 1); with them the two differ, because PyTorch normalises
    by the weights of the index targets.

    Args:
        logits: Unnormalised scores, (N, K) or (N, K, ...).
        targets: The batch's own targets: class indices int64 (N, ...) or class probabilities (N, K, ...).
        plan: The plan the hidden states were mixed with.
        weight: Weight of each class, (K,).
        ignore_index: Class index that contributes nothing. For class indices only.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: In [0, 1].

    Returns:
        A scalar, or (N, ...) for reduction ``"none"``.

    Raises:
        ValueError: If the numbers of rows of logits, targets and plan differ, or an option is out of range.
    """
    plan.check_for_loss()
    if targets.shape[0] != plan.batch_size:
        raise ValueError(f"targets have {targets.shape[0]} rows, but the batch was mixed with {plan.batch_size} rows.")
    partner = targets[plan.partner]
    options = (weight, ignore_index, reduction, label_smoothing)
    # A compiled graph would be made anew for every number; it reads the tensor.
    shared_lam = None if torch.compiler.is_compiling() else plan.shared_lam
    return cross_entropy_of_pair(logits, targets, partner, plan.lam, *options, shared_lam=shared_lam)


def mixed_accuracy(logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Accuracy on a mixed batch: ``lam`` for a hit on the row's own class, ``1 - lam`` for one on its partner's.

    It is not comparable with accuracy on unmixed data: where partners are of other classes, a perfect network reaches
    ``E[max(lam, 1 - lam)]``, which is 0.69 for ``lam ~ Beta(2, 2)``.

    Args:
        logits: Scores, (N, K) or (N, K, ...).
        targets: Class indices, (N, ...).
        plan: The plan the batch was mixed with. Inside a ``training_step`` under ``ManifoldMixupCallback`` it is known.

    Returns:
        float32 scalar in [0, 1]: the plain accuracy if the batch is not mixed.

    Raises:
        ValueError: If the targets have no row for each row of the plan.
    """

    def accuracy(plan: MixPlan | None) -> Tensor:
        predicted = logits.detach().argmax(dim=1)
        if plan is None or not plan.mixes:
            return (predicted == targets).float().mean()
        own, partner, lam = _rows_of(targets, plan)
        return (lam * (predicted == own) + (1 - lam) * (predicted == partner)).mean()

    return accuracy(plan) if plan is not None else halves.once(accuracy)


def mixed_target_entropy(targets: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Mean entropy of mixed targets: the floor under the cross-entropy of a mixed batch.

    A row of two classes has the entropy ``-lam * log(lam) - (1 - lam) * log(1 - lam)``, a row of one class none. No
    network brings the loss below the mean of it, so a training loss that stays high is no sign of a poor fit.

    Args:
        targets: Class indices (N, ...).
        plan: As for :func:`mixed_accuracy`.

    Returns:
        float32 scalar in nats, at most log 2; 0 if the batch is not mixed.

    Raises:
        ValueError: If the targets have no row for each row of the plan.
    """

    def entropy(plan: MixPlan | None) -> Tensor:
        if plan is None or not plan.mixes:
            return torch.zeros((), device=targets.device)
        own, partner, lam = _rows_of(targets, plan)
        return ((-torch.xlogy(lam, lam) - torch.xlogy(1 - lam, 1 - lam)) * (own != partner)).mean()

    return entropy(plan) if plan is not None else halves.once(entropy)


class _Halves:
    """The mixed step that is running: its plan, for functions that are called without one."""

    def __init__(self) -> None:
        self._mixing: Mixing | None = None
        self._values: list[Any] = []
        self._next: int | None = None

    def begin(self, mixing: Mixing) -> None:
        """The own half of a step runs from now on."""
        self._mixing, self._values, self._next = mixing, [], None

    def end(self) -> None:
        """The step is over."""
        self._mixing, self._values, self._next = None, [], None

    def repeat(self, again: bool) -> None:
        """The step runs once more, perhaps on targets in the partners' order; or the own half goes on."""
        self._next = 0 if again else None

    def once(self, function: Callable[[MixPlan | None], Tensor]) -> Tensor:
        """A function of the plan and of targets in their own order; the partners' half gets the own one's value."""
        if self._next is not None and self._next < len(self._values):
            self._next += 1
            value: Tensor = self._values[self._next - 1]
            return value
        mixing = self._mixing if self._next is None else None
        value = function(None if mixing is None else mixing.for_loss)
        if mixing is not None:
            self._values.append(value)
        return value


halves = _Halves()
"""Which half of a mixed step is running, if one is."""


def _rows_of(targets: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, their partners', and ``lam`` in their shape."""
    plan.check_for_loss()
    if len(targets) != plan.batch_size:
        raise ValueError(f"targets have {len(targets)} rows, but the batch was mixed with {plan.batch_size} rows.")
    return targets, targets[plan.partner], plan.lam.view(-1, *[1] * (targets.dim() - 1))


def cross_entropy_of_pair(
    logits: Tensor,
    own: Tensor,
    partner: Tensor,
    lam: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    shared_lam: float | None = None,
) -> Tensor:
    """:func:`mixed_cross_entropy` for targets whose partners' are at hand; ``lam`` is (N,).

    ``shared_lam`` is the number in each row of it, if that is known without waiting for a device.
    """
    _check(logits, own, reduction, label_smoothing)
    if own.is_floating_point():
        targets = linear(own, partner, lam)
        return F.cross_entropy(
            logits,
            targets,
            weight=weight,
            ignore_index=ignore_index,  # refused by PyTorch for class probabilities
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    log_probs = F.log_softmax(logits, dim=1)
    if lam.stride(0) == 0 and label_smoothing == 0:  # one lam for the batch: the same, in fewer operations
        ratio: Any = lam[0].to(log_probs.dtype) if shared_lam is None else shared_lam
        is_plain_mean = weight is None and reduction == "mean"
        losses: Any = _mean_losses(log_probs, own, partner, ignore_index) if is_plain_mean else None
        if losses is None:
            losses = [
                F.nll_loss(log_probs, y, weight, ignore_index=ignore_index, reduction=reduction) for y in (own, partner)
            ]
        return ratio * losses[0] + (1 - ratio) * losses[1]  # not lerp: of two infinite losses it is no number
    lam = lam.to(log_probs.dtype)
    smooth = _smoothing_loss(log_probs, weight) if label_smoothing > 0 else None

    def term(targets: Tensor, ratio: Tensor) -> Tensor:
        loss = F.nll_loss(log_probs, targets, weight, ignore_index=ignore_index, reduction="none")
        if smooth is not None:
            counted = smooth.masked_fill(targets == ignore_index, 0.0)
            loss = (1 - label_smoothing) * loss + label_smoothing * counted
        loss = loss * ratio.view(-1, *[1] * (loss.dim() - 1))  # (N,) -> (N, 1, ..., 1)
        if reduction == "none":
            return loss
        return loss.sum() if reduction == "sum" else loss.sum() / _normaliser(targets, weight, ignore_index, loss)

    return term(own, lam) + term(partner, 1 - lam)


def _mean_losses(log_probs: Tensor, own: Tensor, partner: Tensor, ignore_index: int) -> Tensor | None:
    """``F.nll_loss`` of both targets, (2,), with one gradient instead of two; None where that gains or fits nothing."""
    if log_probs.numel() < _MANY or log_probs.device.type != "cpu":  # on a GPU its sums have no fixed order
        return None
    if torch.compiler.is_compiling():  # which writes one gradient whatever is written here
        return None
    is_plain = type(log_probs) is Tensor and not torch._C._are_functorch_transforms_active()
    if not is_plain or log_probs.dtype not in (torch.float32, torch.float64) or own.dtype != torch.int64:
        return None  # sums over many rows need the precision
    targets = torch.stack((own, partner), dim=1)  # (N, 2, ...)
    is_counted = targets != ignore_index
    targets = targets.masked_fill(~is_counted, 0)
    lowest, highest = map(int, targets.aminmax())
    if lowest < 0 or highest >= log_probs.shape[1]:
        return None  # F.nll_loss refuses it in its own words
    rows = (0, *range(2, targets.dim()))
    return -log_probs.gather(1, targets).masked_fill(~is_counted, 0).sum(rows) / is_counted.sum(rows)


def _check(logits: Tensor, targets: Tensor, reduction: str, label_smoothing: float) -> None:
    expected = logits.shape if targets.is_floating_point() else (logits.shape[0], *logits.shape[2:])
    if logits.dim() < 2 or targets.shape != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: class indices must be "
            "(N, ...) and class probabilities (N, K, ...) for logits (N, K, ...)."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}.")


def _smoothing_loss(log_probs: Tensor, weight: Tensor | None) -> Tensor:
    """The loss on the uniform distribution that label smoothing mixes in: (N, K, ...) -> (N, ...)."""
    if weight is not None:
        log_probs = log_probs * weight.view(-1, *[1] * (log_probs.dim() - 2))  # (K,) -> (K, 1, ..., 1)
    return -log_probs.sum(dim=1) / log_probs.shape[1]


def _normaliser(targets: Tensor, weight: Tensor | None, ignore_index: int, loss: Tensor) -> Tensor | float:
    """What PyTorch's mean divides by: the weights of the counted targets, or their number."""
    counted = targets != ignore_index
    if weight is None:
        return counted.sum().to(loss.dtype)
    return weight[targets.masked_fill(~counted, 0)].to(loss.dtype).mul(counted).sum()
