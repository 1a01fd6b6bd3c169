"""torchmetrics inside ``training_step`` see the batch's own targets, and what they return is no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import Classifier, Plans, assert_no_trace, batches, loader, mixup
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

MakeTrainer = Callable[..., pl.Trainer]


def collection() -> MetricCollection:
    return MetricCollection({"table": MulticlassConfusionMatrix(3), "calibration": MulticlassCalibrationError(3)})


class Measured(Classifier):
    """Measures in all ways, with predictions that carry gradients; keeps its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.table = MulticlassAccuracy(3), MulticlassConfusionMatrix(3)
        self.forwarded, self.updated = collection(), collection()
        self.error, self.mean_loss = MeanSquaredError(), MeanMetric()
        self.logits: list[Tensor] = []
        self.values: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.values.append(self.accuracy(logits, y).detach().clone())
        self.table.update(logits, target=y)
        self.forwarded(logits, y)
        self.updated.update(logits, y)
        self.error(logits[:, 0], y.double())
        self.mean_loss(loss)
        self.logits.append(logits.detach().clone())
        self.losses.append(loss.detach().clone())
        return loss


def states_of(metric: Any) -> list[Any]:
    parts = metric.values() if isinstance(metric, MetricCollection) else [metric]
    return [{name: getattr(part, name) for name in part._defaults} for part in parts]


def test_metrics_have_the_state_of_own_targets(make_trainer: MakeTrainer) -> None:
    net, callback = Measured(), mixup()
    plans = Plans(callback)
    make_trainer(callback, plans).fit(net, loader())
    assert any(plan.layer is not None and float(plan.lam[0]) < 0.9 for plan in plans.plans)
    wanted = Measured()
    for logits, value, (_, y) in zip(net.logits, net.values, batches(), strict=True):
        assert_close(value, wanted.accuracy(logits, y), rtol=0, atol=0)
        for metric in (wanted.table, wanted.forwarded, wanted.updated):
            metric.update(logits, y)
        wanted.error.update(logits[:, 0], y.double())
    for name in ("accuracy", "table", "forwarded", "updated", "error"):
        assert_close(states_of(getattr(net, name)), states_of(getattr(wanted, name)), rtol=1e-6, atol=0)
        for state in states_of(getattr(net, name)):
            values = [item for value in state.values() for item in (value if isinstance(value, list) else [value])]
            assert {type(value) for value in values if isinstance(value, Tensor)} == {Tensor}
    assert int(net.table.confmat.sum()) == 40


def test_a_metric_of_the_loss_holds_the_mixed_loss(make_trainer: MakeTrainer) -> None:
    net = Measured()
    outputs: list[Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs_: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(outputs_["loss"].detach().clone())

    make_trainer(mixup(), Keep()).fit(net, loader())
    own = [F.cross_entropy(logits, y) for logits, (_, y) in zip(net.logits, batches(), strict=True)]
    assert_close(net.mean_loss.compute().double(), torch.stack(outputs).mean(), rtol=1e-6, atol=0)
    assert abs(float(torch.stack(outputs).mean() - torch.stack(own).mean())) > 1e-3


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["alone", "beside a loss"])
def test_a_metric_is_no_loss(make_trainer: MakeTrainer, share: float) -> None:
    class Trained(Measured):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            logits = self(batch[0])
            error = self.error(logits[:, 0], batch[1].double())
            return error if share == 1 else error + F.cross_entropy(logits, batch[1])

    message = (
        "What MeanSquaredError returns takes part in the loss, but a metric sees the batch's own targets alone. "
        r"Compute the loss with the function of torchmetrics\.functional\."
    )
    net = Trained()
    with pytest.raises(RuntimeError, match=message):
        make_trainer(mixup()).fit(net, loader())
    assert_no_trace(net)


def test_the_hooks_are_gone_after_fit(make_trainer: MakeTrainer) -> None:
    net = Measured()
    hooks = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            hooks.append((len(net.accuracy._forward_pre_hooks), len(net.accuracy._forward_hooks)))

    make_trainer(mixup(), Count()).fit(net, loader())
    assert hooks == [(1, 1)] * 5
    assert_no_trace(net)
