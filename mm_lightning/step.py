"""One mixed training step: hand over the batch, run the user's step, prove that features and targets were mixed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mm_lightning.mixup import INPUT, Mixer, MixPlan, TargetPair

__all__ = ["batch_size_of", "is_compiled", "run_mixed_step"]

# In a batch without floating point inputs these hold the input rather than class indices.
_IMAGE_DTYPES = (torch.uint8, torch.int8, torch.bool)


def batch_size_of(batch: Any) -> int:
    """Number of rows of a batch: the length that most of its tensors have, of several the first.

    Raises:
        TypeError: If it has no tensor of one dimension or more.
    """
    sizes = [tensor.shape[0] for tensor in _tensors(batch) if tensor.dim() > 0]
    if not sizes:
        raise TypeError(f"Manifold mixup needs tensors in the batch, got {type(batch).__name__} without any.")
    return max(sizes, key=sizes.count)


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
    *,
    watched: bool = True,
    may_skip: bool = True,
) -> Any:
    """Run a training step with hidden state and targets mixed as planned.

    Args:
        training_step: The user's, taking the batch first.
        args: Its positional arguments. The batch is rebuilt, not changed.
        kwargs: Its keyword arguments.
        plan: A plan that mixes.
        mixer: Attached to the eligible layers.
        watched: Look for unmixed tensors of the batch behind each layer the first time it is mixed.
        may_skip: Whether a step that returns None trains on nothing, as in automatic optimization.

    Returns:
        What ``training_step`` returns.

    Raises:
        RuntimeError: If not exactly one layer mixed the batch once, or if no loss was computed on mixed targets.
        ValueError: If the batch holds no class indices for its rows.
        TypeError: If the input is to be mixed and is not floating point.
    """
    mixer.start(plan)
    watched = watched and mixer.is_first_mix
    try:
        batch = _hand_over(args[0], plan, mixer, watched)
        with _Watch(batch, mixer) if watched else nullcontext():
            output = training_step(batch, *args[1:], **kwargs)
        _prove(plan, mixer, skipped=output is None and may_skip)
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor):
            mixer.check_no_path_around(loss)
    finally:
        mixer.stop()
    return output


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _hand_over(batch: Any, plan: MixPlan, mixer: Mixer, watched: bool) -> Any:
    """Rebuild the batch: class indices become pairs, and for the layer ``"input"`` the inputs are mixed."""
    rows = plan.batch_size
    tensors = [tensor for tensor in _tensors(batch) if tensor.dim() > 0]
    has_inputs = any(tensor.is_floating_point() and tensor.shape[0] == rows for tensor in tensors)

    def is_paired(tensor: Tensor) -> bool:
        is_integer = not (tensor.is_floating_point() or tensor.is_complex())
        return is_integer and (has_inputs or tensor.dtype not in _IMAGE_DTYPES)

    integers = [tensor for tensor in tensors if is_paired(tensor)]
    if not any(tensor.shape[0] == rows for tensor in integers):
        lengths = _listed(tensor.shape[0] for tensor in integers)
        found = f"integer tensors of {lengths} rows" if integers else "no integers"
        raise ValueError(
            f"Manifold mixup found no class indices for the {rows} rows of the batch, but {found}. The batch needs one "
            "integer class index a row, on which training_step computes a cross-entropy."
        )
    if plan.layer == INPUT:
        if not has_inputs:
            raise TypeError(
                "layers names 'input', but the batch holds no floating point tensor to mix. Name the layer that turns "
                "it into floating point numbers, an embedding for example."
            )
        mixer.record_input()

    def replace(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            return tensor
        if is_paired(tensor):
            return TargetPair.wrap(tensor, plan, mixer)
        if not tensor.is_floating_point():
            return tensor
        if plan.layer == INPUT:
            return mixer.mix_input(tensor)
        return _with_a_source(tensor, mixer) if watched and torch.is_grad_enabled() else tensor

    return apply_to_collection(batch, Tensor, replace)


def _with_a_source(tensor: Tensor, mixer: Mixer) -> Tensor:
    """A copy with a place in the autograd graph, so that the mixer can tell where the batch leads around a layer."""
    copy = tensor.detach().requires_grad_().clone()
    assert copy.grad_fn is not None
    mixer.sources.add(copy.grad_fn)
    return copy


def _prove(plan: MixPlan, mixer: Mixer, skipped: bool) -> None:
    """Raise unless the hidden state and the targets were both mixed, once."""
    if not mixer.losses and (skipped or not mixer.ran):
        return  # the user trains on nothing of this batch
    if mixer.is_first_mix and mixer.unreached:
        raise RuntimeError(
            f"The forward pass in training_step does not reach the eligible layers {_listed(mixer.unreached)}. Remove "
            "them from layers."
        )
    runs = mixer.times_mixed
    if runs != 1:
        raise RuntimeError(
            f"Layer {plan.layer!r} ran {runs} times in one training_step, so its mix would not match the targets'. "
            "Choose a layer that runs exactly once, keep other forward passes out of training_step, and in manual "
            "optimization call self.manual_backward."
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
        unmixed = mixer.planned != INPUT
        self.storages = {_storage(x) for x in _tensors(batch) if unmixed and x.is_floating_point()} - {None}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.mixer.has_mixed and torch.is_grad_enabled():
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._check_targets(func, operands)
            unmixed = [tensor for tensor in operands if _storage(tensor) in self.storages]
            if unmixed and any(tensor.requires_grad for tensor in operands) and len(unmixed) < len(operands):
                raise RuntimeError(
                    f"After layer {self.mixer.planned!r} was mixed, '{getattr(func, '__name__', func)}' combines the "
                    f"result with an unmixed tensor of the batch, of shape {tuple(unmixed[0].shape)}. That is a "
                    "path around the layer, a second forward pass, or a loss on this tensor: none can be mixed. Mix at "
                    "a layer that everything runs through."
                )
        return func(*args, **kwargs)

    def _check_targets(self, func: Callable[..., Any], operands: list[Tensor]) -> None:
        is_loss = func is F.cross_entropy and any(tensor.requires_grad for tensor in operands)
        if is_loss and not any(isinstance(tensor, TargetPair) and tensor.is_live for tensor in operands):
            raise RuntimeError(
                f"After layer {self.mixer.planned!r} was mixed, a cross_entropy was computed on targets that are not "
                "the batch's own class indices, or were derived from them in a way that cannot be followed, so they "
                "would be unmixed. Put them into the batch."
            )


def _storage(tensor: Tensor) -> int | None:
    """Where the tensor's memory begins; None where it has none."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    return tensor.untyped_storage().data_ptr()


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)
