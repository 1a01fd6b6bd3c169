"""One training step under Lightning's trainer: what was minimised, and with which gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mm_lightning import ManifoldMixupCallback, MixPlan
from zoo.entry import Entry


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step did.

    Attributes:
        losses: What each backward pass started from, (number of backward passes,).
        grads: Gradient of the sum of the losses, by the name of the parameter; those without one are left out.
    """

    losses: Tensor
    grads: dict[str, Tensor]


class Batches(list[Any]):
    """A plain loader. (A list of batches would be taken for a list of loaders.)"""


class Recorder(pl.Callback):
    """Records every backward pass of automatic and manual optimization, at a learning rate of 0."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.grads: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        torch.manual_seed(0)  # a step that draws noise draws the same again

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())
        pl_module.zero_grad()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.grads[name] = self.grads.get(name, 0) + parameter.grad.clone()


def train_on(batch: Any, module: pl.LightningModule, *callbacks: pl.Callback) -> Step:
    """Train ``module`` on one batch without changing its parameters."""
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, recorder],
    )
    with torch.random.fork_rng(devices=[]):
        trainer.fit(module, Batches([batch]))
    return Step(torch.stack(recorder.losses), recorder.grads)


def train_mixed(
    entry: Entry, layer: str, module: pl.LightningModule | None = None, batch: Any = None
) -> tuple[Step, MixPlan]:
    """Train an entry's module on its batch under the callback, mixed at ``layer``, and return the plan too."""
    callback = ManifoldMixupCallback(alpha=1.0, layers=[layer], seed=8, schedule=None, **entry.options)
    step = train_on(entry.batch() if batch is None else batch, module or entry.make(), callback)
    assert callback.plan is not None
    assert callback.plan.layer == layer
    return step, callback.plan
