"""One mixed training step: hand over the batch, run the user's step, prove that features and targets were mixed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mm_lightning.mixup import INPUT, Mixer, MixPlan, TargetPair
from mm_lightning.mixup.expression import memory_of
from mm_lightning.mixup.trace import Trace
from mm_lightning.probe import Roles, map_indexed

__all__ = ["batch_size_of", "is_compiled", "run_mixed_step"]

_LOSSES = frozenset(
    """
    cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss
    huber_loss kl_div gaussian_nll_loss poisson_nll_loss multi_margin_loss multilabel_margin_loss
    multilabel_soft_margin_loss soft_margin_loss hinge_embedding_loss cosine_embedding_loss margin_ranking_loss ctc_loss
    """.split()
)


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
    roles: Roles,
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
        roles: Which tensors of the batch are targets, and which are inputs.
        watched: Look for unmixed tensors of the batch behind each layer the first time it is mixed.
        may_skip: Whether a step that returns None trains on nothing, as in automatic optimization.

    Returns:
        What ``training_step`` returns, its tensors plain.

    Raises:
        RuntimeError: If not exactly one layer mixed the batch once, or if no loss was computed on mixed targets.
        ValueError: If a target has no row for each row of the batch.
    """
    mixer.start(plan, followed=watched)
    watched = watched and mixer.is_watched
    try:
        batch = _hand_over(args[0], plan, mixer, roles, watched)
        with _Watch(batch, mixer, plan.partner) if watched else nullcontext():
            output = training_step(batch, *args[1:], **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        _prove(plan, mixer, loss, is_automatic=may_skip)
        if isinstance(loss, Tensor):
            mixer.check_no_path_around(_plain(loss))
        if mixer.pairs:
            output = _plain(output) if isinstance(output, Tensor) else apply_to_collection(output, TargetPair, _plain)
    except BaseException:
        mixer.stop()
        raise
    mixer.stop(keeps_targets=True)
    return output


def _plain(tensor: Tensor) -> Tensor:
    return tensor.value if isinstance(tensor, TargetPair) else tensor


def _tensors(batch: Any) -> list[Tensor]:
    if type(batch) in (list, tuple) and all(isinstance(part, Tensor) for part in batch):
        return list(batch)  # what most batches are, at a tenth of the cost
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _hand_over(batch: Any, plan: MixPlan, mixer: Mixer, roles: Roles, watched: bool) -> Any:
    """Rebuild the batch: targets become pairs, and for the layer ``"input"`` the inputs are mixed."""
    rows = plan.batch_size
    mixes_input = plan.layer == INPUT
    mixed = False
    if watched:
        mixer.trace = Trace()

    def replace(tensor: Tensor, index: int) -> Tensor:
        nonlocal mixed
        is_input = index in roles.inputs
        if not roles.is_plain(index):
            if index in roles.targets:
                _check_rows(tensor, rows, mixer)
            if len(tensor) != rows:
                return tensor
            mixed |= mixes_input and is_input and tensor.is_floating_point()
            return TargetPair.wrap(tensor, plan, mixer, is_input=mixes_input and is_input)
        if mixes_input and is_input and tensor.is_floating_point() and len(tensor) == rows:
            mixed = True
            return mixer.mix_input(tensor)
        # So that the mixer can tell where the batch leads around a layer.
        return tensor if mixer.trace is None or not is_input else mixer.trace.follow(tensor, discrete=False)

    handed = map_indexed(replace, batch)
    if mixed:
        mixer.record_input()
    return handed


def _check_rows(targets: Tensor, rows: int, mixer: Mixer) -> None:
    if len(targets) != rows and not mixer.is_explicit:
        raise ValueError(
            f"A tensor of shape {tuple(targets.shape)} of the batch takes part in the loss, but has no row for each of "
            f"the {rows} rows of the batch, so partners cannot be found in it. Give it the batch in dimension 0 "
            "(padded, say), or keep what is the same for every batch in the module."
        )


def _prove(plan: MixPlan, mixer: Mixer, loss: Any, is_automatic: bool) -> None:
    """Raise unless the hidden state and the targets were both mixed, once."""
    if is_automatic and loss is None and not mixer.losses:
        return  # the user trains on nothing of this batch
    if not mixer.losses and not mixer.ran:
        return
    if mixer.is_watched and mixer.unreached:
        raise RuntimeError(
            f"The forward pass in training_step does not reach the eligible layers {_listed(mixer.unreached)}. Remove "
            "them from layers."
        )
    if mixer.times_mixed != mixer.times_expected:
        raise RuntimeError(
            f"Layer {plan.layer!r} ran {mixer.times_mixed} times in one training_step, so its mix would not match the "
            "targets'. Choose a layer that runs exactly once, keep other forward passes out of training_step, and in "
            "manual optimization call self.manual_backward."
        )
    if not mixer.losses or (is_automatic and not (isinstance(loss, TargetPair) and loss.is_mixed)):
        raise RuntimeError(
            f"The hidden state was mixed at layer {plan.layer!r}, but no loss on the batch's targets was seen in what "
            "training_step returns, so the targets were not mixed. Compute the loss from the batch's tensors with "
            "PyTorch functions, or name the function that computes it: ManifoldMixupCallback(loss=...)."
        )
    mixer.accept()


class _Watch(TorchFunctionMode):
    """Refuses to combine the mixed hidden state with unmixed tensors of the batch: a bypass, or a loss on them.

    Pairs see only the functions they are handed to. A tensor that was an input when the step was looked at, and is a
    target now, would be an unmixed one. The first mixed step at each layer in each epoch finds that; later steps pay
    nothing.
    """

    def __init__(self, batch: Any, mixer: Mixer, rows: Tensor) -> None:
        super().__init__()
        self.mixer = mixer
        self.rows = rows
        unmixed = [x for x in _tensors(batch) if x.is_floating_point() and not isinstance(x, TargetPair)]
        self.storages = {memory_of(getattr(x, "value", x)) for x in unmixed if mixer.planned != INPUT} - {None}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if self.mixer.has_mixed and torch.is_grad_enabled():
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if not any(isinstance(tensor, TargetPair) for tensor in operands):
                self._check(getattr(func, "__name__", str(func)), operands)
        return func(*args, **kwargs)

    def _check(self, name: str, operands: list[Tensor]) -> None:
        constants = [tensor for tensor in operands if not tensor.requires_grad]
        if not constants or len(constants) == len(operands):
            return
        unmixed = [tensor for tensor in constants if memory_of(tensor) in self.storages]
        if unmixed and self.mixer.planned not in self.mixer.tolerated:
            raise RuntimeError(
                f"After layer {self.mixer.planned!r} was mixed, '{name}' combines the result with an unmixed tensor of "
                f"the batch, of shape {tuple(unmixed[0].shape)}. That is a path around the layer, or a loss that was "
                "not there when fit began: neither can be mixed. Mix at a layer that everything runs through."
            )
        if self.mixer.written and any(memory_of(tensor) in self.mixer.written - {None} for tensor in constants):
            raise RuntimeError(
                f"'{name}' uses a view of a tensor that the batch's targets were written into after the view was made, "
                "which cannot be followed. Make the view afterwards."
            )
        if name in _LOSSES and not self.mixer.is_explicit and any(self._differs_by_row(tensor) for tensor in constants):
            raise RuntimeError(
                f"After layer {self.mixer.planned!r} was mixed, '{name}' was computed on targets that are not the "
                "batch's, or were derived from them in a way that cannot be followed, so they would be unmixed. Put "
                "them into the batch, or name the losses to mix: ManifoldMixupCallback(loss=...)."
            )

    def _differs_by_row(self, tensor: Tensor) -> bool:
        """Whether partners would have other values: constants, such as a discriminator's ones, are no targets."""
        rows = self.rows
        return tensor.dim() > 0 and len(tensor) == len(rows) and not torch.equal(tensor[rows], tensor)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)
