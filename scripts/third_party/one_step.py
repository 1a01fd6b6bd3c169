"""One training step: plain, under the callback, and as two plain steps with a hook say that it must be."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mm_lightning import ManifoldMixupCallback, MixPlan
from third_party.case import Case, changed

Mix = Callable[[Tensor], Tensor]

OWN = ("chemprop", "darts", "torch_geometric")
"""Packages whose batches are objects of their own."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step did.

    Attributes:
        losses: What each backward pass started from, (number of backward passes,).
        grads: Gradient of the sum of the losses, by the name of the parameter; those without one are left out.
    """

    losses: Tensor
    grads: dict[str, Tensor]


class Recorder(pl.Callback):
    """Records every backward pass, at a learning rate of 0."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.grads: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let nothing move."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Let a step that draws noise draw the same again."""
        torch.manual_seed(0)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss."""
        self.losses.append(loss.detach().clone())
        pl_module.zero_grad()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the gradients."""
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.grads[name] = self.grads.get(name, 0) + parameter.grad.clone()


class Batches(list[Any]):
    """A plain loader. (A list of batches would be taken for a list of loaders.)"""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Trains a case's module on its batch, always from the same weights.

    Attributes:
        case: The case.
        dtype: Of parameters and of the batch's floating point numbers.
    """

    case: Case
    dtype: torch.dtype = torch.float64

    def batch(self) -> Any:
        """The batch."""
        return cast(self.case.batch(), self.dtype)

    def module(self) -> pl.LightningModule:
        """The module."""
        torch.manual_seed(1)
        return self.case.make().to(self.dtype)

    def train(self, batch: Any, module: pl.LightningModule, *callbacks: pl.Callback) -> Step:
        """Train on one batch without changing the parameters."""
        recorder = Recorder()
        trainer = _lightning_of(module).Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[*callbacks, recorder],
        )
        trainer.fit(module, Batches([batch]))
        return Step(torch.stack(recorder.losses), recorder.grads)

    def mixed(self, module: pl.LightningModule, layers: Any, seed: int = 8) -> tuple[Step, MixPlan, tuple[str, ...]]:
        """Train under the callback; also returns the plan and the eligible layers."""
        callback = ManifoldMixupCallback(alpha=1.0, layers=layers, seed=seed, schedule=None, **self.case.options)
        step = self.train(self.batch(), module, callback)
        if callback.plan is None or callback.plan.layer is None:
            raise RuntimeError("The callback trained the batch unmixed.")
        return step, callback.plan, callback.layer_names

    def reference(self, plan: MixPlan, own_targets_only: bool = False) -> Step:
        """Interpolate two runs of the step, which share the mixed hidden state and differ in the targets.

        Every loss and gradient is ``lam * (of own targets) + (1 - lam) * (of partners' targets)``. Where these cannot
        be had without their inputs, the second run sees the partners' rows and mixes them the other way round: what is
        row ``partner[i]`` of the batch is row i there.
        """
        lam, partner, inverse = float(plan.lam[0]), plan.partner, plan.partner.argsort()
        own_first = _mixer(len(partner), lambda h: lam * h + (1 - lam) * h[partner])
        own_last = _mixer(len(partner), lambda h: lam * h[inverse] + (1 - lam) * h)
        own = self._hooked(self.batch(), plan.layer, own_first)
        if own_targets_only:
            return own
        moves_inputs = self.case.with_targets_of is None
        batch = self.case.of_partners(self.batch(), partner)
        other = self._hooked(batch, plan.layer, own_last if moves_inputs else own_first)
        names = own.grads.keys() | other.grads.keys()
        return Step(
            lam * own.losses + (1 - lam) * other.losses,
            {name: lam * own.grads.get(name, 0) + (1 - lam) * other.grads.get(name, 0) for name in names},
        )

    def _hooked(self, batch: Any, layer: str | None, mixer: Callable[[int | None], Mix]) -> Step:
        module, case, mix = self.module(), self.case, mixer(self.case.dims.get(layer or ""))

        def mix_all(tree: Any) -> Any:
            return tree_map_only(Tensor, lambda leaf: mix(leaf) if leaf.is_floating_point() else leaf, tree)

        with ExitStack() as stack:
            if layer != "input":
                hooked = (layer or "",)
            else:
                tables = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
                hooked = tuple(tables) if case.embeddings == ("*",) else case.embeddings
                batch = changed(batch, case.inputs, mix_all) if case.inputs else batch
                for name in case.enters:
                    before = module.get_submodule(name).register_forward_pre_hook(
                        lambda _, args, kwargs: (mix_all(args), mix_all(kwargs)), with_kwargs=True
                    )
                    stack.callback(before.remove)
            for name in hooked:
                after = module.get_submodule(name).register_forward_hook(lambda _, args, out: mix_all(out))
                stack.callback(after.remove)
            return self.train(batch, module)


def _lightning_of(module: Any) -> Any:
    """The package that a module is written for: ``lightning.pytorch``, or its twin of another name."""
    twin = sys.modules.get("pytorch_lightning")
    return twin if twin is not None and isinstance(module, twin.LightningModule) else pl


def difference(got: Step, wanted: Step) -> float:
    """The largest difference of a loss or a gradient, as a share of the largest loss or gradient."""
    names = got.grads.keys() | wanted.grads.keys()
    pairs = [(got.grads.get(name, 0), wanted.grads.get(name, 0)) for name in names]
    largest = max([float(torch.as_tensor(theirs).abs().max()) for _, theirs in pairs], default=1.0)
    gradients = [float(torch.as_tensor(ours - theirs).abs().max()) / largest for ours, theirs in pairs]
    if got.losses.shape != wanted.losses.shape:
        return math.inf
    losses = float((got.losses - wanted.losses).abs().max() / wanted.losses.abs().max())
    numbers = [losses, *gradients]
    return math.inf if any(map(math.isnan, numbers)) else max(numbers)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Turn the floating point tensors of a batch into ``dtype``, also those that objects hold."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cast(value, dtype) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(cast(value, dtype) for value in batch)
    if not type(batch).__module__.startswith(OWN):
        return batch
    slots = [name for kind in type(batch).__mro__ for name in getattr(kind, "__slots__", ())]
    fields = {name: getattr(batch, name) for name in [*slots, *getattr(batch, "__dict__", ())] if hasattr(batch, name)}
    changes = {name: new for name, old in fields.items() if (new := cast(old, dtype)) is not old}
    if callable(batch) or not changes:
        return batch
    twin = copy.copy(batch)
    for name, value in changes.items():
        object.__setattr__(twin, name, value)
    return twin


def _mixer(size: int, mix: Mix) -> Callable[[int | None], Mix]:
    """Mix in a given dimension, or in the first that has as many rows; what has none stays."""

    def of(dim: int | None) -> Mix:
        def in_its_dimension(h: Tensor) -> Tensor:
            place = dim if dim is not None else next((i for i, length in enumerate(h.shape) if length == size), None)
            return h if place is None or h.dim() <= place else mix(h.movedim(place, 0)).movedim(0, place)

        return in_its_dimension

    return of
