"""Label smoothing and weight decay for modules that know neither, against the same by hand."""

from __future__ import annotations

import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback
from mm_lightning.controls import LabelSmoothing, WeightDecay


class Plain(pl.LightningModule):
    """Two layers, trained by SGD with a weight decay of its own; keeps its losses."""

    def __init__(self, loss: Any = F.cross_entropy, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.loss, self.make = loss, optimizer
        self.losses: list[Tensor] = []
        with torch.no_grad():
            for place, weights in enumerate(self.parameters()):
                weights.copy_(torch.arange(weights.numel()).mul(0.7).add(place).sin().view_as(weights))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss: Tensor = self.loss(self.head(torch.tanh(self.hidden(inputs))), targets)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), lr=0.5)


def fit(module: Plain, *callbacks: pl.Callback) -> Plain:
    inputs = torch.arange(32).mul(1.3).sin().view(8, 4)
    data = TensorDataset(inputs, torch.arange(8) % 3)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    return module


def smoothed_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    wanted = 0.8 * torch.eye(3)[targets] + 0.2 / 3
    return -(wanted * logits.log_softmax(dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
def test_labels_are_smoothed_as_by_hand(loss: Any) -> None:
    ours, by_hand = fit(Plain(loss), LabelSmoothing(0.2)), fit(Plain(smoothed_by_hand))
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(by_hand.losses))
    torch.testing.assert_close(ours.head.weight, by_hand.head.weight)
    assert "training_step" not in vars(ours)


@pytest.mark.parametrize("is_first", [True, False])
def test_smoothing_and_mixing_go_together(is_first: bool) -> None:
    callbacks = [LabelSmoothing(0.2), ManifoldMixupCallback(layers="hidden", seed=3)]
    ours = fit(Plain(), *(callbacks if is_first else reversed(callbacks)))
    by_hand = fit(Plain(smoothed_by_hand), ManifoldMixupCallback(layers="hidden", seed=3))
    torch.testing.assert_close(ours.head.weight, by_hand.head.weight)
    assert "training_step" not in vars(ours)


class Twice(TorchFunctionMode):
    """What torch.device is, too: it stands between a step and every function that the network calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factor = 2 if func is torch.tanh else 1
        return func(*args, **(kwargs or {})) * factor if factor == 2 else func(*args, **(kwargs or {}))


class WithMode(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with Twice():
            return super().training_step(batch, batch_idx)


class ByHand(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss: Tensor = self.loss(self.head(torch.tanh(self.hidden(inputs)) * 2), targets)
        self.losses.append(loss.detach())
        return loss


def test_a_mode_of_the_step_is_on_in_the_network_that_is_mixed() -> None:
    of_mode = fit(WithMode(), ManifoldMixupCallback(layers="hidden", seed=3))
    by_hand = fit(ByHand(), ManifoldMixupCallback(layers="hidden", seed=3))
    torch.testing.assert_close(of_mode.head.weight, by_hand.head.weight)


def test_other_losses_are_refused_and_the_step_is_put_back() -> None:
    module = Plain(lambda logits, targets: F.nll_loss(logits.log_softmax(dim=1), targets))
    with pytest.raises(RuntimeError, match=r"training_step computes none\. Smooth them in the loss"):
        fit(module, LabelSmoothing())
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.3),
        lambda logits, targets: F.cross_entropy(logits, targets, None, None, -100, None, "mean", 0.3),
    ],
    ids=["by name", "by place"],
)
def test_labels_are_not_smoothed_twice(loss: Any) -> None:
    with pytest.raises(RuntimeError, match=r"LabelSmoothing\(0.1\) meets a cross_entropy with label_smoothing=0.3"):
        fit(Plain(loss), LabelSmoothing())


def test_weight_decay_is_that_of_the_optimizer() -> None:
    ours = fit(Plain(), WeightDecay(0.25))
    by_hand = fit(Plain(optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, weight_decay=0.25)))
    torch.testing.assert_close(ours.head.weight, by_hand.head.weight, rtol=0, atol=0)
    assert not torch.equal(ours.head.weight, fit(Plain()).head.weight)


def test_an_optimizer_without_weight_decay_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^LBFGS knows no weight_decay\."):
        fit(Plain(optimizer=torch.optim.LBFGS), WeightDecay())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LabelSmoothing(1.0), ValueError, r"smoothing must be in \[0, 1\), got 1.0"),
        (lambda: LabelSmoothing("much"), TypeError, "smoothing must be"),
        (lambda: WeightDecay(-1), ValueError, "weight_decay must be a number >= 0, got -1"),
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_callback_is_copied_without_its_fit() -> None:
    assert pickle.loads(pickle.dumps(LabelSmoothing(0.2))).smoothing == 0.2
