"""What the callback tells of itself: the summary, log keys, histograms and messages."""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import LAYERS, Classifier, Plans, batches, loader, mixup
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.testing import assert_close

from mm_lightning import MixPlan, mixed_target_entropy

MakeTrainer = Callable[..., pl.Trainer]


class Kept(Classifier):
    """Keeps its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.logits.append(self(batch[0]))
        return F.cross_entropy(self.logits[-1], batch[1])


def test_summary_counts_the_batches_of_each_layer(make_trainer: MakeTrainer) -> None:
    callback = mixup(probability=0.5)
    plans = Plans(callback)
    with pytest.warns(UserWarning, match=r"A batch of one row has no partner to mix with; it trains unmixed\."):
        make_trainer(callback, plans, max_epochs=3).fit(Classifier(), loader(41))
    counts = Counter(plan.layer or "unmixed" for plan in plans.plans)
    assert callback.summary() == {name: counts[name] for name in [*LAYERS, "unmixed"]}
    assert sum(callback.summary().values()) == 3 * 6
    assert [plan.layer for plan in plans.plans[5::6]] == [None] * 3  # of one row
    assert 3 < counts["unmixed"] < 15


def test_summary_begins_anew_with_fit(make_trainer: MakeTrainer) -> None:
    callback = mixup()
    assert callback.summary() == {"unmixed": 0}
    for _ in range(2):
        make_trainer(callback).fit(Classifier(), loader())
        assert sum(callback.summary().values()) == 5


def _entropy(y: Tensor, plan: MixPlan) -> float:
    lam = [float(value) for value in plan.lam]
    rows = [
        0.0 if a == b else -x * math.log(x) - (1 - x) * math.log(1 - x)
        for x, a, b in zip(lam, y.tolist(), y[plan.partner].tolist(), strict=True)
    ]
    return sum(rows) / len(rows)


def _accuracy(logits: Tensor, y: Tensor, plan: MixPlan) -> float:
    hits = logits.argmax(dim=1)
    lam = [float(value) for value in plan.lam]
    rows = [
        x * int(hits[i] == y[i]) + (1 - x) * int(hits[i] == y[j])
        for i, (x, j) in enumerate(zip(lam, plan.partner.tolist(), strict=True))
    ]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("per_sample", [False, True], ids=["per batch", "per sample"])
def test_logged_values(make_trainer: MakeTrainer, tmp_path: Path, every: int, per_sample: bool) -> None:
    callback, net, logger = mixup(probability=0.7, per_sample=per_sample), Kept(), CSVLogger(tmp_path)
    plans = Plans(callback)
    make_trainer(callback, plans, max_epochs=2, logger=logger, log_every_n_steps=every).fit(net, loader())
    with open(logger.experiment.metrics_file_path, newline="") as file:
        logged = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    wanted: list[dict[str, float]] = []
    for step, (plan, logits, (_, y)) in enumerate(zip(plans.plans, net.logits, batches() * 2, strict=True)):
        if (step + 1) % every:
            continue
        row = {"epoch": step // 5, "step": step, "mixup/lam": 1.0, "mixup/layer": -1.0}
        row |= {key: float("nan") for key in ("mixup/acc_mixed", "mixup/loss_floor") if any(key in w for w in wanted)}
        if plan.layer is not None:
            row |= {"mixup/lam": float(plan.lam.mean()), "mixup/layer": float(LAYERS.index(plan.layer))}
            row |= {"mixup/acc_mixed": _accuracy(logits, y, plan), "mixup/loss_floor": _entropy(y, plan)}
        wanted.append(row)
    assert [row.keys() for row in logged] == [row.keys() for row in wanted]
    for got, row in zip(logged, wanted, strict=True):
        assert {key: float(value) for key, value in got.items()} == pytest.approx(row, rel=1e-5, nan_ok=True)
    assert {plan.layer for plan in plans.plans} == {None, *LAYERS}


def test_tensorboard_gets_histograms_of_each_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback, logger = mixup(probability=0.7), TensorBoardLogger(tmp_path)
    plans = Plans(callback)
    make_trainer(callback, plans, max_epochs=2, logger=logger).fit(Classifier(), loader())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    lams = [1.0 if plan.layer is None else float(plan.lam[0]) for plan in plans.plans]
    layers = [-1.0 if plan.layer is None else float(LAYERS.index(plan.layer)) for plan in plans.plans]
    for name, values in (("lam", lams), ("layer", layers)):
        found = events.Histograms(f"mixup/{name}_of_epoch")
        assert [event.step for event in found] == [5, 10]
        for event, epoch in zip(found, (values[:5], values[5:]), strict=True):
            histogram = event.histogram_value
            got = [histogram.num, histogram.min, histogram.max, histogram.sum, histogram.sum_squares]
            assert got == pytest.approx([5, min(epoch), max(epoch), sum(epoch), sum(x * x for x in epoch)])


@pytest.mark.parametrize(
    ("layers", "told"), [("auto", "'input', 'first'"), (["second", "input"], "'input', 'second'")], ids=["auto", "list"]
)
def test_the_layers_are_told_once(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, layers: Any, told: str
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        make_trainer(mixup(layers=layers), max_epochs=2).fit(Classifier(), loader())
    records = [record for record in caplog.records if "mixup" in record.getMessage()]
    assert [record.getMessage() for record in records] == [f"Manifold mixup mixes at {told}."]
    assert records[0].name.startswith("lightning.pytorch")
    assert records[0].levelno == logging.INFO


def test_entropy_of_mixed_targets() -> None:
    y, partner = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 2, 3, 0])  # the second row meets its own class
    plan = MixPlan("input", partner, torch.tensor([0.5, 0.3, 0.25, 1.0]), partner.argsort())
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert_close(mixed_target_entropy(y, plan), torch.tensor((math.log(2) + quarter) / 4))
    assert float(mixed_target_entropy(y)) == 0
    tokens = torch.stack([y, torch.zeros(4, dtype=torch.int64)], dim=1)  # (N, T)
    assert_close(mixed_target_entropy(tokens, plan), torch.tensor((math.log(2) + quarter) / 8))


def test_two_callbacks_are_refused(make_trainer: MakeTrainer) -> None:
    message = r"The trainer has 2 ManifoldMixupCallbacks, which would mix every batch more than once\."
    with pytest.raises(ValueError, match=message):
        make_trainer(mixup(), mixup(alpha=2.0)).fit(Classifier(), loader())


def test_a_batch_of_one_row_is_told_once(make_trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="one row has no partner") as caught:
        make_trainer(mixup(), max_epochs=2).fit(Classifier(), loader(17))
    told = [str(warning.message) for warning in caught if "one row" in str(warning.message)]
    assert told == ["A batch of one row has no partner to mix with; it trains unmixed."]


class Failing(pl.Callback):
    """Ends a fit after its second batch."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise InterruptedError


class Regression(Classifier):
    """A loss that is no cross-entropy."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[1].double())


def test_a_fit_begins_without_what_a_failed_one_has_seen(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback, logger = mixup(), TensorBoardLogger(tmp_path)
    with pytest.raises(InterruptedError):
        make_trainer(callback, Failing()).fit(Classifier(), loader())
    plans = Plans(callback)
    make_trainer(callback, plans, logger=logger).fit(Classifier(), loader())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    histogram = events.Histograms("mixup/lam_of_epoch")[0].histogram_value
    assert histogram.num == 5
    assert histogram.sum == pytest.approx(sum(float(plan.lam[0]) for plan in plans.plans))
    assert sum(callback.summary().values()) == 5


def test_what_the_last_fit_measured_is_not_logged_in_the_next(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback, keys = mixup(), []
    for number, net in enumerate((Classifier(), Regression())):
        logger = CSVLogger(tmp_path, version=number)
        make_trainer(callback, logger=logger, log_every_n_steps=1).fit(net, loader())
        with open(logger.experiment.metrics_file_path, newline="") as file:
            keys.append({key for key in next(csv.reader(file)) if key.startswith("mixup/")})
    assert keys[0] - keys[1] == {"mixup/acc_mixed", "mixup/loss_floor"}
    assert keys[1] == {"mixup/lam", "mixup/layer"}


def test_every_fit_warns_anew(make_trainer: MakeTrainer) -> None:
    callback = mixup()
    for _ in range(2):
        with pytest.warns(UserWarning, match="one row has no partner"):
            make_trainer(callback).fit(Classifier(), loader(17))


def test_batches_that_a_setting_leaves_unmixed_are_counted(make_trainer: MakeTrainer) -> None:
    class Stopping(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                callback.probability = 0.0

    callback = mixup()
    make_trainer(callback, Stopping()).fit(Classifier(), loader())
    assert callback.summary()["unmixed"] == 3
    assert sum(callback.summary().values()) == 5


def test_what_was_mixed_is_known_after_training_in_other_processes(make_trainer: MakeTrainer) -> None:
    callback = mixup()
    make_trainer(callback, strategy="ddp_spawn", devices=1).fit(Classifier(), loader())
    assert callback.layer_names == tuple(LAYERS)
    assert sum(callback.summary().values()) == 5
    assert callback.summary()["unmixed"] == 0
