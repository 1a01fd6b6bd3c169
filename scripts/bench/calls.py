"""What the calls of mixing cost where a training step has emptied the caches: in a bare loop, without Lightning."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fitting import RandomBatches
from bench.networks import Network, mnist_bottleneck, residual_network
from bench.timing import compare
from mm_lightning.fast_cpu import fast_products, keep_freed_memory
from mm_lightning.mixup import MixPlan, PlanSource, mix, mixed_cross_entropy

__all__ = ["measure"]

Hidden = Callable[[Tensor, MixPlan], Tensor]
Loss = Callable[[Tensor, Tensor, MixPlan], Tensor]
PLANS = 64  # drawn before


def measure(quick: bool) -> dict[str, Any]:
    """Time steps in which one call is added after a hidden layer, or takes the place of the loss."""
    if quick:
        networks = [(mnist_bottleneck(batch_size=8), 4), (residual_network(batch_size=8, size=8), 2)]
    else:
        networks = [(mnist_bottleneck(), 4), (residual_network(), 2)]
    keep_freed_memory()
    with fast_products():
        rows = [_row(network, place, 2 if quick else 200) for network, place in networks]
    notes = [
        "With fast_cpu on all sides. 'empty Function' is a torch.autograd.Function that returns its input and its "
        "gradient; 'clone' copies the hidden state where 'mix' mixes it. Plans are drawn before."
    ]
    return {"rows": rows, "notes": notes}


def _row(network: Network, place: int, rounds: int) -> dict[str, Any]:
    source = PlanSource(["hidden"])
    plans = [source.draw(network.shape[0], batch_index=index) for index in range(PLANS)]
    batches = RandomBatches(network.shape, network.classes, 1)
    optimizer = network.module.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    steps = count()

    def run(hidden: Hidden | None = None, loss: Loss = _plain) -> float:
        index = next(steps)
        inputs, targets = batches[index]
        plan = plans[index % PLANS]
        begin = time.perf_counter()
        optimizer.zero_grad()
        state = inputs
        for number, part in enumerate(network.parts):
            state = part(state if hidden is None or number != place else hidden(state, plan))
        loss(state, targets, plan).backward()
        optimizer.step()
        return time.perf_counter() - begin

    sides = {
        "no mixup": run,
        "empty Function": lambda: run(lambda state, plan: _Empty.apply(state)),
        "clone": lambda: run(lambda state, plan: state.clone()),
        "mix": lambda: run(mix),
        "mixed_cross_entropy": lambda: run(loss=mixed_cross_entropy),
        "both": lambda: run(mix, mixed_cross_entropy),
        "textbook formula": lambda: run(_textbook),
    }
    return compare(f"{network.name}, bare loop", sides, "no mixup", rounds)


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _plain(logits: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
    return F.cross_entropy(logits, targets)


def _textbook(hidden: Tensor, plan: MixPlan) -> Tensor:
    lam = plan.shared_lam
    assert lam is not None
    return lam * hidden + (1 - lam) * hidden[plan.partner]
