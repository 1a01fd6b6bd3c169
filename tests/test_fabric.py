"""Loops of one's own: Lightning Fabric and plain PyTorch, with the functions of mm_lightning.mixup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from classifier import (
    LAYERS,
    LR,
    Classifier,
    Network,
    Plans,
    assert_same_weights,
    batches,
    loader,
    mixup,
    train_by_hand,
)
from lightning.fabric import Fabric
from torch import Tensor

from mm_lightning.mixup import BetaRatio, Mixer, MixPlan, PlanSource, mix, mixed_cross_entropy, resolve_layers

MakeTrainer = Callable[..., pl.Trainer]
EPOCHS = 3


class Blocks(Network):
    """The network with a forward pass that is written for mixing."""

    def forward(self, x: Tensor, plan: MixPlan | None = None) -> Tensor:
        def here(hidden: Tensor, layer: str) -> Tensor:
            return mix(hidden, plan) if plan is not None and plan.layer == layer else hidden

        hidden = torch.tanh(here(self.first(here(x, "input")), "first"))
        return self.head(torch.tanh(here(self.second(hidden), "second")))


def source() -> PlanSource:
    """The draws of :func:`mixup`'s callback."""
    return PlanSource(LAYERS, ratio=BetaRatio(alpha=1.0), seed=5)


@pytest.fixture
def fabric() -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


def train_with_functions(fabric: Fabric | None) -> tuple[Network, list[MixPlan]]:
    """The loop of the README, with Fabric or without."""
    net, data, plans = Blocks(), loader(), []
    model, optimizer = net, torch.optim.SGD(net.parameters(), lr=LR)
    if fabric is not None:
        model, optimizer = fabric.setup(net, optimizer)
        data = fabric.setup_dataloaders(data)
    for epoch in range(EPOCHS):
        for batch_index, (x, y) in enumerate(data):
            plan = source().draw(len(x), epoch=epoch, batch_index=batch_index).to(x.device)
            optimizer.zero_grad()
            loss = mixed_cross_entropy(model(x, plan), y, plan)
            loss.backward() if fabric is None else fabric.backward(loss)
            optimizer.step()
            plans.append(plan)
    return net, plans


def train_with_hooks(fabric: Fabric) -> tuple[Network, list[MixPlan]]:
    """The same on a network that is not written for it."""
    net, plans = Network(), []
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=LR))
    data = fabric.setup_dataloaders(loader())
    with _attached(net) as mixer:
        for epoch in range(EPOCHS):
            for batch_index, (x, y) in enumerate(data):
                plan = source().draw(len(x), epoch=epoch, batch_index=batch_index)
                mixer.start(plan)
                logits = model(mixer.mix_input(x) if plan.layer == "input" else x)
                mixer.stop()
                optimizer.zero_grad()
                fabric.backward(mixed_cross_entropy(logits, y, plan))
                optimizer.step()
                plans.append(plan)
    return net, plans


@contextmanager
def _attached(net: Network) -> Iterator[Mixer]:
    mixer = Mixer(resolve_layers(net, LAYERS))
    mixer.attach()
    try:
        yield mixer
    finally:
        mixer.detach()


@pytest.fixture(params=["fabric", "plain torch", "hooks"])
def trained(request: pytest.FixtureRequest, fabric: Fabric) -> tuple[Network, list[MixPlan]]:
    if request.param == "hooks":
        return train_with_hooks(fabric)
    return train_with_functions(fabric if request.param == "fabric" else None)


def test_a_loop_of_ones_own_equals_the_formulas(trained: tuple[Network, list[MixPlan]]) -> None:
    net, plans = trained
    assert {plan.layer for plan in plans} == set(LAYERS)
    assert_same_weights(net, train_by_hand(plans, EPOCHS * batches()))


def test_a_loop_of_ones_own_equals_the_callback_with_the_same_seed(
    trained: tuple[Network, list[MixPlan]], make_trainer: MakeTrainer
) -> None:
    net, plans = trained
    callback = mixup()
    kept, model = Plans(callback), Classifier()
    make_trainer(callback, kept, max_epochs=EPOCHS).fit(model, loader())
    assert [_numbers(plan) for plan in plans] == [_numbers(plan) for plan in kept.plans]
    assert_same_weights(net, model)


def _numbers(plan: MixPlan) -> tuple[Any, ...]:
    return plan.layer, plan.partner.tolist(), plan.lam.tolist()
