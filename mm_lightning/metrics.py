"""Metrics inside ``training_step`` see the batch's own targets, and what they return is no loss."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric, MetricCollection

from mm_lightning.mixup import TargetPair
from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["show_own_targets"]


def show_own_targets(module: nn.Module) -> list[RemovableHandle]:
    """Hook the torchmetrics of ``module``. Otherwise one whose predictions carry gradients would be taken for a loss.

    Returns:
        Handles that remove the hooks.
    """
    handles = []
    for part in module.modules():
        if isinstance(part, (Metric, MetricCollection)):
            hook = _OwnTargets()
            handles.append(part.register_forward_pre_hook(hook.before, with_kwargs=True))
            handles.append(part.register_forward_hook(hook.after, with_kwargs=True))
    return handles


class _OwnTargets:
    """The hooks around one metric."""

    def __init__(self) -> None:
        self.pair: TargetPair | None = None

    def before(self, metric: nn.Module, args: Any, kwargs: Any) -> Any:
        """Hand over the batch's own targets."""
        self.pair = next((tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, TargetPair)), None)
        if self.pair is None:
            return None
        return map_tensors(_shown, (args, kwargs))

    def after(self, metric: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Mark the result, so that its use in a loss is an error."""
        pair, self.pair = self.pair, None
        if pair is None:
            return None
        reason = (
            f"What {type(metric).__name__} returns takes part in the loss, but a metric sees the batch's own targets "
            "alone. Compute the loss with the function of torchmetrics.functional."
        )
        return map_tensors(lambda tensor: pair.lose(tensor, reason) if tensor.requires_grad else tensor, output)


def _shown(tensor: Any) -> Any:
    """The own targets, and the loss that is trained on."""
    return tensor.value if isinstance(tensor, TargetPair) else tensor
