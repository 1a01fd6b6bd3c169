"""What the tests of working together share: a small classifier, its data, and its mixed training by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback, MixPlan

LAYERS = ["input", "first", "second"]
LR = 0.1


class Network(nn.Module):
    """4-8-8-3 with tanh, float64. The same weights every time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Classifier(Network, pl.LightningModule):
    """The same as a LightningModule that knows nothing of mixing. ``losses`` keeps those of its training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = LR
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Plans(pl.Callback):
    """Keeps the plan of every batch."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback = callback
        self.plans: list[MixPlan] = []

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.callback.plan is not None
        self.plans.append(self.callback.plan)


def mixup(**settings: Any) -> ManifoldMixupCallback:
    return ManifoldMixupCallback(**{"alpha": 1.0, "layers": LAYERS, "seed": 5, "schedule": None, **settings})


def rows(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def batches(n: int = 40, batch_size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(batch_size) for tensor in rows(n)), strict=True))


def loader(n: int = 40, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(n)), batch_size=batch_size)


def mixed_logits(net: Network, x: Tensor, plan: MixPlan) -> Tensor:
    """The network's forward pass, mixed at the planned layer."""
    lam = plan.lam.to(x.dtype)[:, None]

    def maybe_mix(hidden: Tensor, layer: str) -> Tensor:
        return lam * hidden + (1 - lam) * hidden[plan.partner] if plan.layer == layer else hidden

    hidden = maybe_mix(x, "input")
    hidden = maybe_mix(net.first(hidden), "first")
    hidden = maybe_mix(net.second(torch.tanh(hidden)), "second")
    return net.head(torch.tanh(hidden))


def mixed_loss(net: Network, x: Tensor, y: Tensor, plan: MixPlan, **options: Any) -> Tensor:
    """The paper's loss: ``lam * loss(own) + (1 - lam) * loss(partner)``, a row at a time."""
    logits, lam = mixed_logits(net, x, plan), plan.lam.to(x.dtype)
    own, partner = (F.cross_entropy(logits, targets, reduction="none", **options) for targets in (y, y[plan.partner]))
    return (lam * own + (1 - lam) * partner).mean()


def train_by_hand(
    plans: Iterable[MixPlan],
    data: Iterable[tuple[Tensor, Tensor]],
    after_step: Callable[[Network], object] = lambda net: None,
    net: Network | None = None,
) -> Network:
    """One step of SGD a batch, as planned."""
    net = Network() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for plan, (x, y) in zip(plans, data, strict=True):
        optimizer.zero_grad()
        mixed_loss(net, x, y, plan).backward()
        optimizer.step()
        after_step(net)
    return net


def weights_of(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def assert_same_weights(got: nn.Module, wanted: nn.Module, atol: float = 1e-12) -> None:
    """Equal within ``atol``, with 0 bit for bit; and away from where training began, so that something was tested."""
    assert_close(weights_of(got), weights_of(wanted), rtol=0, atol=atol)
    moved = [(new - old).abs().max() for new, old in zip(weights_of(got), weights_of(Network()), strict=True)]
    assert min(moved) > 1e-3


def assert_no_trace(module: pl.LightningModule) -> None:
    """No hook, and the class's own ``training_step``."""
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert "training_step" not in module.__dict__
