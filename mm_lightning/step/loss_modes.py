"""Seeing the loss functions that a step calls: to fuse, to weigh rows with one lam each, to measure what is logged."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.overrides import TorchFunctionMode

from mm_lightning.mixup import mixed_accuracy, mixed_target_entropy
from mm_lightning.mixup.mixing import Mixing
from mm_lightning.mixup.targets import cross_entropy_of_pair

__all__ = ["Fusing", "LossMode", "Measuring", "RowWeights", "paused"]


_LEAST = 1e-12  # a share of a half below which its rows' losses are no part of the mixed one


class LossMode(TorchFunctionMode):
    """A mode that is on while a step runs, but not in the network, which may be compiled."""

    is_on = False

    def __enter__(self) -> LossMode:
        super().__enter__()
        self.is_on = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.is_on = False
        super().__exit__(*error)


@contextmanager
def paused(modes: Sequence[LossMode]) -> Iterator[None]:
    """Switch modes off for a while. Others that were entered after them, as ``with torch.device(...)``, stay on."""
    paused_ones = [mode for mode in modes if mode.is_on]
    if not paused_ones:
        yield
        return
    stack: list[Any] = overrides._get_current_function_mode_stack()
    lowest = min(place for place, mode in enumerate(stack) if any(mode is one for one in paused_ones))
    above = stack[lowest:]
    others = [mode for mode in above if not any(mode is one for one in paused_ones)]
    _replace(above, others)
    for mode in paused_ones:
        mode.is_on = False
    try:
        yield
    finally:
        _replace(others, above)
        for mode in paused_ones:
            mode.is_on = True


def _replace(top: Sequence[Any], by: Sequence[Any]) -> None:
    """Put modes in the place of those on top of the stack; there is no public way to reach below the topmost."""
    for _ in top:
        overrides._pop_mode()
    for mode in by:
        overrides._push_mode(mode)


class Fusing(LossMode):
    """Computes the plain cross-entropy of the mixed network on targets of the batch for both halves at once.

    That is the whole mixed loss of a step that returns it and nothing else: no second half is needed then.

    Args:
        mixing: The batch's.
        is_target: Whether a tensor is one of the batch that has its rows in dimension 0.
        is_mixed: Whether a tensor is what the mixed network returned.
        rows: Weighs rows, if that was entered before.

    Attributes:
        losses: The mixed losses.
        is_wanted: Whether to go on.
    """

    def __init__(
        self,
        mixing: Mixing,
        is_target: Callable[[Tensor], bool],
        is_mixed: Callable[[Tensor], bool],
        rows: RowWeights | None = None,
    ) -> None:
        super().__init__()
        self.mixing, self.is_target, self.is_mixed = mixing, is_target, is_mixed
        self._below = [] if rows is None else [rows]
        self.losses: list[Tensor] = []
        self.is_wanted = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Fuse, if ``func`` is the cross-entropy."""
        kwargs = kwargs or {}
        if func is not F.cross_entropy or not self.is_wanted:
            return func(*args, **kwargs)
        return self._fused(*args, **kwargs)

    def _fused(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        is_plain = size_average is None and reduce is None and reduction != "none"
        if not (is_plain and self.is_target(target) and self.is_mixed(input)):
            more = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
            return F.cross_entropy(input, target, *more)
        plan = self.mixing.for_loss
        partner = target.index_select(0, plan.partner)
        options = (weight, ignore_index, reduction, label_smoothing)
        with paused(self._below):
            loss = cross_entropy_of_pair(input, target, partner, plan.lam, *options, shared_lam=plan.shared_lam)
        self.losses.append(loss)
        return loss

    @contextmanager
    def off(self) -> Iterator[None]:
        """Fuse nothing until the end of the ``with`` block."""
        before, self.is_wanted = self.is_wanted, False
        try:
            yield
        finally:
            self.is_wanted = before

    def has(self, loss: Any) -> bool:
        """Whether something is a mixed loss, and not what was computed from one."""
        return any(loss is other for other in self.losses)


class RowWeights(LossMode):
    """Weighs rows in every loss function of PyTorch that has a ``reduction``.

    The own half's rows have the weights ``lam / mean(lam)``, the partners' ``(1 - lam) / mean(1 - lam)``, so that the
    interpolation of both with ``mean(lam)`` weighs each row's loss with its ``lam``, and a term without rows with 1.

    Args:
        mixing: The batch's, with one ``lam`` per row.
    """

    def __init__(self, mixing: Mixing) -> None:
        super().__init__()
        self.mixing = mixing
        self._is_partners = False

    @contextmanager
    def of_partners(self) -> Iterator[None]:
        """Weigh the rows of the partners' half."""
        self._is_partners = True
        try:
            yield
        finally:
            self._is_partners = False

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Of the rows in the half that runs, (N,), in the type of the losses that they weigh."""
        plan = self.mixing.for_loss
        # The very number that the halves are interpolated with: it cancels out.
        lam, mean = plan.lam.to(dtype), torch.as_tensor(plan.ratio).to(dtype)
        part, mean = (1 - lam, 1 - mean) if self._is_partners else (lam, mean)
        return part / mean.clamp_min(max(_LEAST, torch.finfo(dtype).tiny))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Weigh the rows, if ``func`` is a loss function."""
        kwargs = kwargs or {}
        whole = func(*args, **kwargs)
        signature = _signature_of(func)
        if signature is None or not isinstance(whole, Tensor) or not whole.requires_grad:
            return whole
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        reduction = bound.arguments["reduction"]
        bound.arguments["reduction"] = "none"
        rows = whole if reduction == "none" else func(*bound.args, **bound.kwargs)
        weights = self.weights(rows.dtype)
        count = len(weights)
        if rows.dim() == 0 or rows.shape[0] % count:
            return whole  # not by row: the proof finds the loss wrong, and it is refused
        weights = weights.repeat_interleave(rows.shape[0] // count)
        weighted = rows * weights.view(-1, *[1] * (rows.dim() - 1))  # (N,) -> (N, 1, ..., 1)
        if reduction == "none":
            return weighted
        if reduction == "sum":
            return weighted.sum()
        # The mean's own normaliser, which may be a sum of class weights.
        mean = whole.detach()
        normaliser = torch.where(mean == 0, rows.numel(), rows.detach().sum() / mean)
        return weighted.sum() / normaliser


class Measuring(LossMode):
    """Measures the first cross-entropy on class indices (N,) of a step: its accuracy and its floor.

    Attributes:
        mixing: The batch's, once it begins.
        measured: Accuracy on the mixed targets and their entropy, scalars by name; empty without such a loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixing: Mixing | None = None
        self.measured: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, if ``func`` is the cross-entropy."""
        kwargs = kwargs or {}
        if func is F.cross_entropy and not self.measured and self.mixing is not None:
            logits, targets = (*args[:2], *(kwargs[name] for name in ("input", "target") if name in kwargs))[:2]
            is_classes = targets.dim() == 1 and not targets.is_floating_point() and logits.requires_grad
            if is_classes and len(targets) == self.mixing.plan.batch_size:
                plan = self.mixing.for_loss
                self.measured = {
                    "acc_mixed": mixed_accuracy(logits, targets, plan),
                    "loss_floor": mixed_target_entropy(targets, plan),
                }
        return func(*args, **kwargs)


@functools.cache
def _signature_of(func: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function with a ``reduction``; None of others."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return None
    return signature if "reduction" in signature.parameters else None
