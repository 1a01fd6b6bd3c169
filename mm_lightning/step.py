"""One mixed training step: hand over the batch, run the user's step, prove that features and targets were mixed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mm_lightning.mixup import INPUT, Mixer, MixPlan, TargetPair

__all__ = ["batch_size_of", "is_compiled", "run_mixed_step"]

# uint8 is left out: it holds images more often than class indices.
_CLASS_INDICES = (torch.int64, torch.int32, torch.int16)


def batch_size_of(batch: Any) -> int:
    """Number of rows of a batch: the length of its first tensor that has one.

    Raises:
        TypeError: If there is no such tensor.
    """
    sizes = [tensor.shape[0] for tensor in _tensors(batch) if tensor.dim() > 0]
    if not sizes:
        raise TypeError(f"Manifold mixup needs tensors in the batch, got {type(batch).__name__} without any.")
    return sizes[0]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has been applied to ``module`` or to a part of it."""
    dynamo = sys.modules.get("torch._dynamo")  # a second to import, and imported already if anything was compiled
    if dynamo is None:
        return False
    wrapped = getattr(module, "_compiler_ctx", None) is not None  # where Lightning keeps what it unwrapped
    return wrapped or any(
        isinstance(part, dynamo.OptimizedModule) or part._compiled_call_impl is not None for part in module.modules()
    )


def run_mixed_step(
    training_step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: MixPlan,
    mixer: Mixer,
    watched: bool = True,
) -> Any:
    """Run a training step with hidden state and targets mixed as planned.

    Args:
        training_step: The user's, taking the batch first.
        args: Its positional arguments. The batch is rebuilt, not changed.
        kwargs: Its keyword arguments.
        plan: A plan that mixes.
        mixer: Attached to the eligible layers.
        watched: Look for unmixed tensors of the batch behind each layer the first time it is mixed.

    Returns:
        What ``training_step`` returns.

    Raises:
        RuntimeError: If not exactly one layer mixed the batch once, or if no loss was computed on mixed targets.
        ValueError: If the batch holds no class indices for its rows.
        TypeError: If the input is to be mixed and is not floating point.
    """
    mixer.start(plan)
    try:
        batch = _hand_over(args[0], plan, mixer)
        with _Watch(args[0], mixer) if watched and mixer.is_first_mix else nullcontext():
            output = training_step(batch, *args[1:], **kwargs)
        _prove(output, plan, mixer)
    finally:
        mixer.stop()
    return output


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _hand_over(batch: Any, plan: MixPlan, mixer: Mixer) -> Any:
    """Rebuild the batch: class indices become pairs, and for the layer ``"input"`` the inputs are mixed."""
    rows = plan.batch_size
    tensors = [tensor for tensor in _tensors(batch) if tensor.dim() > 0]
    indices = [tensor for tensor in tensors if tensor.dtype in _CLASS_INDICES]
    inputs = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.shape[0] == rows]
    if not any(tensor.shape[0] == rows for tensor in indices):
        found = (
            f"integer tensors of {_listed(tensor.shape[0] for tensor in indices)} rows" if indices else "no integers"
        )
        raise ValueError(
            f"Manifold mixup found no class indices for the {rows} rows of the batch, but {found}. The batch needs one "
            "integer class index a row, on which training_step computes a cross-entropy."
        )
    if plan.layer == INPUT:
        if not inputs:
            raise TypeError(
                "layers names 'input', but the batch holds no floating point tensor to mix. Name the layer that turns "
                "it into floating point numbers, an embedding for example."
            )
        mixer.record_input()

    def replace(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            return tensor
        if tensor.dtype in _CLASS_INDICES:
            return TargetPair.wrap(tensor, plan, mixer)
        return mixer.mix_input(tensor) if plan.layer == INPUT and tensor.is_floating_point() else tensor

    return apply_to_collection(batch, Tensor, replace)


def _prove(output: Any, plan: MixPlan, mixer: Mixer) -> None:
    """Raise unless the hidden state and the targets were both mixed, once."""
    if output is None and not mixer.losses:
        return  # the user skips this batch
    if mixer.is_first_mix and mixer.unreached:
        raise RuntimeError(
            f"The forward pass in training_step does not reach the eligible layers {_listed(mixer.unreached)}. Remove "
            "them from layers."
        )
    runs = mixer.times_mixed
    if runs != 1:
        raise RuntimeError(
            f"Layer {plan.layer!r} ran {runs} times in one training_step, so its mix would not match the targets'. "
            "Choose a layer that runs exactly once, and keep other forward passes out of training_step."
        )
    if not mixer.losses:
        raise RuntimeError(
            f"The hidden state was mixed at layer {plan.layer!r}, but training_step computed no F.cross_entropy or "
            "nn.CrossEntropyLoss on the batch's class indices, so the targets were not. Compute the loss there."
        )
    mixer.accept()


class _Watch(TorchFunctionMode):
    """Refuses to combine the mixed hidden state with unmixed tensors of the batch: a bypass, or a loss on them.

    Pairs see only the functions they are handed to. A reconstruction loss against the input, say, would compare a mixed
    output with an unmixed target. The first mixed step at each layer finds that; later steps pay nothing.
    """

    def __init__(self, batch: Any, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.storages = {_storage(tensor) for tensor in _tensors(batch) if tensor.is_floating_point()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.mixer.has_mixed and torch.is_grad_enabled():
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            unmixed = [tensor for tensor in operands if not tensor.requires_grad and _storage(tensor) in self.storages]
            if unmixed and len(unmixed) < len(operands):
                raise RuntimeError(
                    f"After layer {self.mixer.planned!r} was mixed, '{getattr(func, '__name__', func)}' combines the "
                    f"result with an unmixed tensor of the batch, of shape {tuple(unmixed[0].shape)}. That is a "
                    "path around the layer, a second forward pass, or a loss on this tensor: none can be mixed. Mix at "
                    "a layer that everything runs through."
                )
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)
