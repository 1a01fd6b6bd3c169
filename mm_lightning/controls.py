"""What mixup is to be held against: regularisers that any LightningModule can be trained with, unmodified."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mm_lightning.arguments import check_number
from mm_lightning.namespaces import CallbackOfBoth, LightningModule, Trainer
from mm_lightning.step.attach import Attached

__all__ = ["LabelSmoothing", "WeightDecay"]

_SIGNATURE = signature(F.cross_entropy)


class LabelSmoothing(CallbackOfBoth):
    """Smooths the labels of every cross-entropy that ``training_step`` computes (Szegedy et al., 2016).

    With smoothing e and K classes the target becomes (1 - e) * one-hot + e / K, as ``label_smoothing`` of
    ``torch.nn.functional.cross_entropy`` has it. Validation and test are left alone.

    Args:
        smoothing: e, in [0, 1).

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside its range.
        RuntimeError: In training, if the first step calls no ``cross_entropy``, or one that smooths its labels already.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        check_number("smoothing", smoothing, "in [0, 1)", lambda e: 0 <= e < 1, "0.1 is usual.")
        self.smoothing = float(smoothing)
        self._attached: Attached | None = None
        self._was_called = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand in for the step; before mixing does, whose losses have to be smoothed, too."""
        if stage == "fit":
            self._was_called = False
            self._attached = Attached(pl_module, self._step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the step back."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the step back."""
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit."""
        return {**self.__dict__, "_attached": None}

    def _step(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _Smoothed(self.smoothing) as smoothed:
            output = original(*args, **kwargs)
        if not smoothed.calls and not self._was_called:
            raise RuntimeError(
                "LabelSmoothing smooths the labels of torch.nn.functional.cross_entropy, and training_step computes "
                "none. Smooth them in the loss, or leave the callback out."
            )
        self._was_called = True
        return output

    def _release(self) -> None:
        if self._attached is not None:
            self._attached.release()
            self._attached = None


class WeightDecay(CallbackOfBoth):
    """Gives every group of every optimizer a weight decay, in the place of its own.

    What it means is the optimizer's: a gradient of ``weight_decay * weight`` in SGD and Adam, decoupled from the
    gradient in AdamW.

    Args:
        weight_decay: >= 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative.
        RuntimeError: When training starts, if an optimizer knows no weight decay.
    """

    def __init__(self, weight_decay: float = 1e-3) -> None:
        super().__init__()
        check_number("weight_decay", weight_decay, "a number >= 0", lambda decay: decay >= 0, "0 is none.")
        self.weight_decay = float(weight_decay)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it; here, where a checkpoint has been read already."""
        for optimizer in trainer.optimizers:
            groups = optimizer.param_groups
            if any("weight_decay" not in group for group in groups):
                raise RuntimeError(
                    f"{type(optimizer).__name__} knows no weight_decay. Choose another optimizer, or leave "
                    "the callback out."
                )
            for group in groups:
                group["weight_decay"] = self.weight_decay


class _Smoothed(TorchFunctionMode):
    """Within it, cross-entropies smooth their labels."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self._smoothing = smoothing
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        self.calls += 1
        bound = _SIGNATURE.bind(*args, **kwargs)
        if own := bound.arguments.get("label_smoothing"):
            raise RuntimeError(
                f"LabelSmoothing({self._smoothing}) meets a cross_entropy with label_smoothing={own} already. Leave "
                "one of them out."
            )
        bound.arguments["label_smoothing"] = self._smoothing
        return func(*bound.args, **bound.kwargs)
