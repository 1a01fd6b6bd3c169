"""Targets that know their partners': how a loss call that was not written for mixing becomes the mixed loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.targets import cross_entropy_of_pair

__all__ = ["TargetPair", "mixed_accuracy"]

# Functions that move, cast, relabel or compare targets row by row. They are applied to the batch's own targets and to
# the partners' alike. The result of any other function is no longer known to be targets.
_FOLLOWED = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze permute transpose movedim expand contiguous clone detach
    ravel pad to type type_as long int short float double half bfloat16 bool cpu cuda
    __getitem__ narrow select index_select take gather scatter chunk split unbind stack cat one_hot
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_not logical_and logical_or __and__ __or__
    __invert__ masked_fill where clamp
    add sub rsub mul floor_divide remainder
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __floordiv__ __mod__
    """.split()
)
_IN_PLACE = frozenset(
    """
    __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    """.split()
)
_LOOK_UPS = frozenset({"__getitem__", "gather", "index_select", "take", "scatter"})
_STATISTICS = frozenset({"bincount", "histc", "unique", "unique_consecutive", "nonzero", "sum"})
_REORDERING = frozenset({"gather", "index_select", "take", "transpose", "permute", "movedim", "expand", "stack", "cat"})


class TargetPair(Tensor):
    """The batch's own targets, which carry their partners' along.

    To user code it is the batch's own tensor: same values, dtype, device and storage, and metrics see just that. What
    is derived from it row by row (``.view(-1)``, ``.long()``, ``one_hot``, a look-up table) is a pair again. Only a
    cross-entropy that takes part in the backward pass sees both halves, and computes
    ``lam * loss(own) + (1 - lam) * loss(partner)``. Any other differentiable use after the batch was mixed is an error.

    A pair lives as long as its training step. Kept longer, it is just its own tensor.

    Attributes:
        own: The batch's own targets, a plain tensor.
        partner: The partners' targets, of the same shape; None after a function that cannot be followed.
        plan: The plan that the batch is mixed by.
        mixer: Records the losses computed on mixed targets.
        lost_in: Name of the function that could not be followed, or None.
    """

    own: Tensor
    partner: Tensor | None
    plan: MixPlan
    mixer: Mixer
    lost_in: str | None

    @property
    def is_live(self) -> bool:
        """Whether the batch of these targets is being mixed now."""
        return self.mixer.is_on(self.plan)

    @classmethod
    def wrap(cls, targets: Tensor, plan: MixPlan, mixer: Mixer) -> TargetPair:
        """Pair the targets (N, ...) of a batch with their partners'. ``targets`` is not changed."""
        return _pair(targets, targets[plan.partner], plan, mixer)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply ``func`` to the own targets and, where that keeps its meaning, to the partners'."""
        kwargs = kwargs or {}
        pairs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        if func is F.cross_entropy and any(pair.mixer.planned is not None for pair in pairs):
            return _cross_entropy(*args, **kwargs)
        pairs = [pair for pair in pairs if pair.is_live]
        name = getattr(func, "__name__", str(func))
        own_args, own_kwargs = tree_map_only(cls, lambda pair: pair.own, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*own_args, **own_kwargs)
        if not pairs:
            return result
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            return _changed_in_place(func, name, args, kwargs, pairs, result)
        if any(tensor.requires_grad for tensor in results):
            _refuse_after_mixing(name, pairs[0])
            return result
        if all(tensor.dim() == 0 for tensor in results):
            return result  # numbers, shapes and reductions: what metrics are made of
        return _follow(func, name, args, kwargs, pairs, result)


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
    if isinstance(targets, TargetPair) and targets.is_live:
        own, partner, lam = *_halves(targets, "mixed_accuracy"), targets.plan.lam
    elif plan is not None:
        own, partner, lam = targets, targets[plan.partner], plan.lam
    else:
        return (predicted == targets).float().mean()
    lam = lam.view(-1, *[1] * (own.dim() - 1))  # (N,) -> (N, 1, ...)
    return (lam * (predicted == own) + (1 - lam) * (predicted == partner)).mean()


def _pair(own: Tensor, partner: Tensor | None, plan: MixPlan, mixer: Mixer, lost_in: str | None = None) -> TargetPair:
    pair = own.as_subclass(TargetPair)
    pair.own, pair.partner, pair.plan, pair.mixer, pair.lost_in = own, partner, plan, mixer, lost_in
    return pair


def _halves(pair: TargetPair, consumer: str) -> tuple[Tensor, Tensor]:
    if pair.partner is None:
        raise RuntimeError(
            f"{consumer} got targets that went through '{pair.lost_in}', which cannot be followed, so it cannot be "
            "mixed. Compute them in the data loader instead."
        )
    return pair.own, pair.partner


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` with its own signature, where at least one argument is a pair."""
    if not isinstance(target, TargetPair) or isinstance(logits, TargetPair) or isinstance(weight, TargetPair):
        raise RuntimeError("cross_entropy can be mixed only where its target, and nothing else, is of the batch.")
    if not (torch.is_grad_enabled() and logits.requires_grad):  # a metric, not a loss
        return F.cross_entropy(
            logits, target.own, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if not target.is_live:
        raise RuntimeError("cross_entropy got targets of another batch than the one that is mixed. Use this batch's.")
    if size_average is not None or reduce is not None:
        raise TypeError("cross_entropy's size_average and reduce are deprecated and cannot be mixed; use reduction.")
    own, partner = _halves(target, "cross_entropy")
    lam = target.plan.lam
    if not target.mixer.has_mixed:
        raise RuntimeError(
            f"cross_entropy was computed before layer {target.mixer.planned!r} mixed the batch: the forward pass does "
            "not reach that layer, or reaches it later. Choose layers that every forward pass runs through."
        )
    target.mixer.check_path(logits)
    if own.shape[0] != lam.shape[0]:
        if not _is_one_number(lam):
            raise RuntimeError(
                f"With one lam per sample the targets must keep the batch in dimension 0, but they have shape "
                f"{tuple(own.shape)} for {lam.shape[0]} rows. Use per_sample=False."
            )
        lam = lam[:1].expand(own.shape[0])  # flattened targets, say
    loss = cross_entropy_of_pair(logits, own, partner, lam, weight, ignore_index, reduction, label_smoothing)
    target.mixer.losses.append("cross_entropy")
    return loss


def _changed_in_place(
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pairs: list[TargetPair],
    result: Any,
) -> Any:
    """Change the partners' half too, if it is a pair that was changed. A plain tensor is changed but once."""
    changed = args[0]
    if isinstance(changed, TargetPair):
        if changed.partner is not None:
            partner_args, partner_kwargs = _partner_of((args, kwargs))
            func(*partner_args, **partner_kwargs)
        return None if result is None else changed
    if changed.requires_grad:  # logits, by class index
        _refuse_after_mixing(name, pairs[0])
    if name.startswith("scatter"):  # one-hot targets; a metric's state is changed by other functions
        return _pair(result, None, pairs[0].plan, pairs[0].mixer, name)
    return result


def _refuse_after_mixing(name: str, pair: TargetPair) -> None:
    # Before the mix, batch tensors that meet parameters are inputs (token indices in an embedding, say).
    if pair.mixer.has_mixed:
        raise RuntimeError(
            f"'{name}' uses the batch's class indices in a differentiable way after the batch was mixed, which cannot "
            "be mixed, nor can another integer or boolean tensor of the batch, such as a mask. Compute the loss with "
            "F.cross_entropy or nn.CrossEntropyLoss, and mix after the last use of a mask."
        )


def _follow(
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pairs: list[TargetPair],
    result: Any,
) -> Any:
    """Make the result a pair if it still is targets, else leave it the plain result on the own targets."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    only_targets = all(isinstance(operand, TargetPair) for operand in operands)
    first = pairs[0]
    lost_in = next((pair.lost_in for pair in pairs if pair.lost_in), None)
    if lost_in is None and name in _FOLLOWED and (only_targets or name in _LOOK_UPS):
        if _is_one_number(first.plan.lam) or _keeps_rows(name, args):
            partner_args, partner_kwargs = _partner_of((args, kwargs))
            of_partner = iter(tree_leaves(func(*partner_args, **partner_kwargs)))
            return tree_map_only(Tensor, lambda own: _pair(own, next(of_partner), first.plan, first.mixer), result)
        lost_in = name

    def lose(own: Tensor) -> Tensor:
        # What has as many rows could still serve as targets, integers do; statistics of other shapes cannot.
        if own.dim() == 0 or len(own) != len(first.own) or name in _STATISTICS:
            return own
        if lost_in is None and (own.is_floating_point() or (own.dtype == torch.bool and not only_targets)):
            return own
        return _pair(own, None, first.plan, first.mixer, lost_in or name)

    return tree_map_only(Tensor, lose, result)


def _keeps_rows(name: str, args: tuple[Any, ...]) -> bool:
    """Whether row i of the result is row i of the targets, as one lam per sample needs it."""
    if not isinstance(args[0], TargetPair):
        return True  # a look-up table, indexed by the targets
    if name == "__getitem__":
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(index, slice) and index == slice(None)
    return name not in _REORDERING


def _is_one_number(lam: Tensor) -> bool:
    return lam.stride(0) == 0


def _partner_of(tree: Any) -> Any:
    return tree_map_only(TargetPair, lambda pair: pair.partner, tree)
