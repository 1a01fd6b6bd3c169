"""Targets that know their partners': how a loss that was not written for mixing becomes the mixed loss.

A loss is a function of targets. Evaluated on a pair, each of its steps is evaluated for the batch's own targets and for
the partners', and the two results are interpolated: ``lam * loss(own) + (1 - lam) * loss(partner)``, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_lightning.mixup.calls import PairCall
from mm_lightning.mixup.compiled import compiled_call
from mm_lightning.mixup.expression import Expression
from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.pair import Pair, become_pair, one_lam
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.targets import cross_entropy_of_pair
from mm_lightning.mixup.trees import tensors_in

__all__ = ["TargetPair", "mix_loss", "mixed_accuracy", "mixed_target_entropy"]


class TargetPair(Pair):
    """Targets of a mixed batch, and what is computed from them. See :class:`Pair`."""

    @classmethod
    def wrap(cls, targets: Tensor, plan: MixPlan, mixer: Mixer, *, is_input: bool = False) -> TargetPair:
        """Pair the targets (N, ...) of a batch with their partners'. ``targets`` is not changed.

        Args:
            targets: The batch's own.
            plan: A plan that mixes.
            mixer: The mixer that was started with it.
            is_input: Whether it is the network's input too, which the network sees mixed for the layer ``"input"``.
        """
        return become_pair(targets.as_subclass(cls), targets, plan, mixer, is_input=is_input)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply ``func`` to the values and see to it that the result is a pair where its operands are."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return compiled_call(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.cross_entropy and (loss := _fused_cross_entropy(*args, **kwargs)) is not None:
                return loss
            return PairCall(func, args, kwargs).result()


def mixed_accuracy(logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Accuracy on a mixed batch: ``lam`` for a hit on the row's own class, ``1 - lam`` for one on its partner's.

    It is not comparable with accuracy on unmixed data: where partners are of other classes, a perfect network reaches
    ``E[max(lam, 1 - lam)]``, which is 0.69 for ``lam ~ Beta(2, 2)``.

    Args:
        logits: Scores, (N, K) or (N, K, ...).
        targets: Class indices, (N, ...). Inside a ``training_step`` under ``ManifoldMixupCallback`` the batch's targets
            know their partners, so that ``plan`` is not needed.
        plan: The plan the batch was mixed with.

    Returns:
        float32 scalar in [0, 1]: the plain accuracy if the batch is not mixed.

    Raises:
        RuntimeError: If the targets went through a function that cannot be followed.
    """
    predicted = logits.detach().argmax(dim=1)
    mixed = _own_and_partner(targets, plan)
    if mixed is None:
        return (predicted == targets).float().mean()
    own, partner, lam = mixed
    plan = targets.plan if isinstance(targets, TargetPair) else plan
    if not torch.compiler.is_compiling() and plan is not None and (shared_lam := plan.shared_lam) is not None:
        hits = [(predicted == classes).float().mean() for classes in (own, partner)]
        return torch.lerp(hits[1], hits[0], shared_lam)
    lam = lam.view(-1, *[1] * (own.dim() - 1))  # (N,) -> (N, 1, ...)
    return (lam * (predicted == own) + (1 - lam) * (predicted == partner)).mean()


def mixed_target_entropy(targets: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Mean entropy of mixed targets: the floor under the cross-entropy of a mixed batch.

    A row of two classes has the entropy ``-lam * log(lam) - (1 - lam) * log(1 - lam)``, a row of one class none. No
    network brings the loss below the mean of it, so a training loss that stays high is no sign of a poor fit.

    Args:
        targets: Class indices (N, ...), as for :func:`mixed_accuracy`.
        plan: The plan the batch was mixed with; not needed inside a ``training_step`` under ``ManifoldMixupCallback``.

    Returns:
        float32 scalar in nats, at most log 2; 0 if the batch is not mixed.

    Raises:
        RuntimeError: If the targets went through a function that cannot be followed.
    """
    mixed = _own_and_partner(targets, plan)
    if mixed is None:
        return torch.zeros((), device=targets.device)
    own, partner, lam = mixed
    entropy = -torch.xlogy(lam, lam) - torch.xlogy(1 - lam, 1 - lam)
    return (entropy.view(-1, *[1] * (own.dim() - 1)) * (own != partner)).mean()


def mix_loss(loss: Callable[..., Any], name: str, mixer: Mixer | None, *args: Any, **kwargs: Any) -> Any:
    """Evaluate any loss on the batch's targets and on their partners', and interpolate.

    Args:
        loss: A function of targets and of what the network made of the mixed batch.
        name: What to call it in messages.
        mixer: Of the mixed step; None outside of one, where ``loss`` is called as it is.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        ``lam * loss(own) + (1 - lam) * loss(partner)``, for every tensor that ``loss`` returns.

    Raises:
        RuntimeError: If it is called before the planned layer has run, or cannot be interpolated.
    """
    tensors = tensors_in((args, kwargs))
    if mixer is not None and mixer.is_in_named_loss:  # which calls this one
        return loss(*args, **kwargs)
    if not any(isinstance(tensor, TargetPair) for tensor in tensors):
        if mixer is not None and mixer.has_mixed and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                f"loss={name} got nothing that is known to be the batch's targets, so it cannot be mixed. Call it with "
                "the batch's tensors, or with what PyTorch functions make of them."
            )
        return loss(*args, **kwargs)
    call = PairCall(loss, args, kwargs)
    call.name = name
    return call.mixed_explicitly()


def _own_and_partner(targets: Tensor, plan: MixPlan | None) -> tuple[Tensor, Tensor, Tensor] | None:
    if isinstance(targets, TargetPair):
        own, partner, lam = targets.own, targets.partner, targets.plan.lam
        return own, partner, lam if len(own) == len(lam) else one_lam(lam, own, "mixed_accuracy").expand(len(own))
    return None if plan is None else (targets, targets[plan.partner], plan.lam)


def _fused_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Pair | None:
    """``F.cross_entropy`` with its own signature in one pass over the logits; None where it is no plain case."""
    if not isinstance(target, TargetPair) or isinstance(logits, TargetPair) or isinstance(weight, TargetPair):
        return None
    mixer, lam = target.mixer, target.plan.lam
    is_loss = torch.is_grad_enabled() and logits.requires_grad and mixer.has_mixed and not mixer.is_explicit
    if not is_loss or target.is_mixed or size_average is not None or reduce is not None:
        return None
    own, partner = target.own, target.partner
    if logits.grad_fn is not None:
        mixer.check_path(logits, "cross_entropy")
    if own.shape != partner.shape or own.dim() == 0:
        return None
    if own.shape[:1] != lam.shape or not target.is_aligned:
        lam = one_lam(lam, own, "cross_entropy").expand(own.shape[0])  # flattened targets, say
    options = (weight, ignore_index, reduction, label_smoothing)
    loss = cross_entropy_of_pair(logits, own, partner, lam, *options, shared_lam=target.plan.shared_lam)
    mixer.losses.append("cross_entropy")
    if mixer.measures and not mixer.measured and own.dim() == 1 and not own.is_floating_point():
        mixer.measured = {"acc_mixed": mixed_accuracy(logits, target), "loss_floor": mixed_target_entropy(target)}
    expression = None
    if lam.stride(0) == 0 or reduction == "none":
        args = (logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
        expression = Expression(F.cross_entropy, args, {}, [logits, target])
    return target.derive(loss, is_mixed=True, is_pure=False, expression=expression)
