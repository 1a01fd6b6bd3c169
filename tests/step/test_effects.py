"""What the look and the partners' half do to the world: nothing, or what one plain step does."""

from __future__ import annotations

import collections
import copy
import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier import LR, Network, Plans, mixup, rows
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import MeanMetric

import mm_lightning
from mm_lightning import ManifoldMixupCallback, MixPlan
from mm_lightning.step.effects import Contents
from mm_lightning.step.logs import between

MakeTrainer = Callable[..., pl.Trainer]
X, Y = rows(6)


class Batches(list[Any]):
    """A plain loader of given batches."""


class Meter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.total, self.seen, self.array = 0.0, [0], np.zeros(2)


class Experiment:
    """What a logger writes to."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def write(self, value: float) -> None:
        self.values.append(value)


class Kept(DummyLogger):
    """A logger with an experiment of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Experiment()

    @property
    def experiment(self) -> Any:
        return self.own


class Busy(Network, pl.LightningModule):
    """A step with every side effect there is."""

    running: Tensor

    def __init__(self, is_manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not is_manual
        self.counter, self.listed, self.counts, self.recent = 0, [torch.zeros(2)], {"n": 0}, collections.deque(maxlen=2)
        self.register_buffer("running", torch.zeros(4, dtype=torch.float64))
        self.ema = copy.deepcopy(self.first).requires_grad_(False)
        self.loss, self.metrics = MeanMetric(), {"loss": MeanMetric()}
        self.torch_rng = torch.Generator().manual_seed(3)
        self.numpy_rng, self.python_rng = np.random.default_rng(3), random.Random(3)
        self.array, self.meter, self.norm = np.zeros(3), Meter(), 0.0
        self.saw_logger: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        noise = torch.randn(1) + np.random.rand() + random.random()  # noqa: NPY002
        noise = noise + torch.randn(1, generator=self.torch_rng) + self.numpy_rng.random() + self.python_rng.random()
        loss = F.cross_entropy(self(x + 0.01 * noise.double()), y)
        self.counter += 1
        self.listed.append(torch.ones(2))
        self.listed[0] += 1
        self.counts["n"] += 1
        self.counts[f"at {self.counter}"] = self.counter
        self.recent.append(self.counter)
        with torch.no_grad():
            self.running.lerp_(x.mean(dim=0), 0.1)
            for own, mean in zip(self.first.parameters(), self.ema.parameters(), strict=True):
                mean.lerp_(own, 0.5)
        self.loss.update(loss.detach())
        self.metrics["loss"].update(loss.detach())
        self.array += self.counter
        self.meter.total += self.counter
        self.meter.seen.append(self.counter)
        self.meter.array += 1
        self.saw_logger.append(self.logger is not None)
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        if self.logger is not None:
            self.logger.experiment.write(loss.item())
        self.print(f"step {self.counter}")
        if not self.automatic_optimization:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.norm += float(self.first.weight.grad.norm())
            optimizer.step()
            scheduler.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [*self.first.parameters(), *self.second.parameters(), *self.head.parameters()], lr=LR, momentum=0.9
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def state(self) -> dict[str, Any]:
        """Everything that the step changes, as it is now."""
        names = ("counter", "listed", "counts", "recent", "array", "norm", "saw_logger", "training")
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        own |= {"meter": vars(self.meter), "weights": self.state_dict()}
        own["grads"] = [parameter.grad for parameter in self.parameters()]
        own["needs"] = [parameter.requires_grad for parameter in self.parameters()]
        own["metrics"] = [(m.metric_state, m._update_count) for m in (self.loss, self.metrics["loss"])]
        own["rngs"] = [self.torch_rng.get_state(), self.numpy_rng.bit_generator.state, self.python_rng.getstate()]
        own["global"] = [torch.get_rng_state(), np.random.get_state(), random.getstate()]  # noqa: NPY002
        return copy.deepcopy(own)


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def assert_same(got: Any, wanted: Any) -> None:
    """Equal bit for bit, through containers."""
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        got, wanted = list(got.values()), list(wanted.values())
    if isinstance(wanted, (list, tuple, collections.deque)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, Tensor):
        assert torch.equal(got, wanted)
    elif isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(got, wanted)
    else:
        assert got == wanted


@pytest.mark.parametrize("is_manual", [False, True], ids=["automatic", "manual"])
def test_a_look_leaves_the_module_as_it_was(is_manual: bool, capsys: pytest.CaptureFixture[str]) -> None:
    seed()
    module = Busy(is_manual)
    before, parts = module.state(), [id(value) for value in module.__dict__.values()]
    mm_lightning.inspect(module, (X, Y))
    assert_same(module.state(), before)
    assert [id(value) for value in module.__dict__.values()] == parts
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("is_manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("how", ["inspected", "off", "mixed"])
def test_the_step_has_the_effects_of_one_plain_step(
    make_trainer: MakeTrainer, is_manual: bool, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, found, printed = Batches([(X, Y)] * 4), [], []
    for is_plain in (True, False):
        seed()
        module = Busy(is_manual)
        if not is_plain and how == "inspected":
            mm_lightning.inspect(module, data[0])
        callback = ManifoldMixupCallback(alpha=0.0 if how == "off" else 1.0, layers="first")
        callbacks = [] if is_plain or how == "inspected" else [callback]
        make_trainer(*callbacks, max_epochs=2).fit(module, data)
        state = module.state()
        if how == "mixed":  # the weights are others, and what comes from the loss
            state["metrics"] = state["metrics"][1][1]
            state["weights"] = state["weights"]["running"]
            del state["grads"], state["norm"]
        found.append(state)
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")])
    assert_same(found[1], found[0])
    assert printed[0] == [f"step {number}" for number in range(1, 9)]
    if how != "mixed":
        assert printed[1] == printed[0]


class Counting(Network, pl.LightningModule):
    """A step whose loss depends on what it counts, and that logs in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.kept, self.mean = 0, {"seen": (torch.zeros((), dtype=torch.float64),)}, MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        self.kept["seen"][0].add_(1)  # in place, in containers
        loss = self.kept["seen"][0].clone() * F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"squared": loss**2, "number": float(loss.detach()), "seen": self.seen})
        self.mean(loss.detach())
        self.log("mean", self.mean)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def losses(self, plan: MixPlan, number: int) -> tuple[float, float, float]:
        """``lam``, and the losses of both halves by hand."""
        lam = float(plan.lam[0])
        first = self.first(X)
        mixed = lam * first + (1 - lam) * first[plan.partner]
        logits = self.head(torch.tanh(self.second(torch.tanh(mixed))))
        own, partners = F.cross_entropy(logits, Y), F.cross_entropy(logits, Y[plan.partner])
        return lam, number * float(own.detach()), number * float(partners.detach())


def test_both_halves_begin_with_the_state_of_the_step_and_their_logs_are_interpolated(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module, callback = Counting(), mixup(layers="first")
    plans, logger = Plans(callback), CSVLogger(tmp_path)
    make_trainer(callback, plans, logger=logger, log_every_n_steps=1).fit(module, Batches([(X, Y)] * 4))
    assert module.seen == module.kept["seen"][0] == 4
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["loss"]]
    assert len(lines) == 4
    for number, (line, plan) in enumerate(zip(lines, plans.plans, strict=True), start=1):
        lam, own, partners = module.losses(plan, number)
        assert_close(float(line["loss"]), lam * own + (1 - lam) * partners, rtol=1e-6, atol=0)
        assert_close(float(line["squared"]), lam * own**2 + (1 - lam) * partners**2, rtol=1e-6, atol=0)
        assert_close(float(line["number"]), lam * own + (1 - lam) * partners, rtol=1e-6, atol=0)
        assert float(line["seen"]) == number
        assert_close(float(line["mean"]), own, rtol=1e-6, atol=0)  # a metric sees the batch's own targets


def test_the_loss_and_own_accuracy_of_a_plain_cross_entropy_are_logged_alike(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Plain(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.log_dict({"loss": loss, "accuracy": (logits.argmax(1) == batch[1]).double().mean()})
            return loss

    module, callback = Plain(), mixup(layers="first")
    plans, logger = Plans(callback), CSVLogger(tmp_path)
    make_trainer(callback, plans, logger=logger, log_every_n_steps=1).fit(module, Batches([(X, Y)] * 4))
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["loss"]]
    for line, plan in zip(lines, plans.plans, strict=True):
        lam, own, partners = module.losses(plan, 1)
        assert_close(float(line["loss"]), lam * own + (1 - lam) * partners, rtol=1e-6, atol=0)
        first = module.first(X)
        mixed = module.head(torch.tanh(module.second(torch.tanh(lam * first + (1 - lam) * first[plan.partner]))))
        right = mixed.argmax(1)
        accuracy = lam * (right == Y).double().mean() + (1 - lam) * (right == Y[plan.partner]).double().mean()
        assert_close(float(line["accuracy"]), float(accuracy), rtol=1e-6, atol=0)


def test_a_step_that_fails_is_told_in_words_that_its_own_handlers_catch(make_trainer: MakeTrainer) -> None:
    class Broken(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError("labels")

    with pytest.raises(
        KeyError, match="could not look at training_step of Broken, which fails with KeyError: 'labels'"
    ):
        make_trainer(mixup()).fit(Broken(), Batches([(X, Y)] * 2))


class DrawsLater(Network, pl.LightningModule):
    """Noise in the loss from the third step on, which no look has seen; what was drawn is written down outside."""

    def __init__(self, drawn: dict[int, list[float]]) -> None:
        super().__init__()
        self.drawn = lambda step, number: drawn.setdefault(step, []).append(number)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = 1.0
        if batch_idx >= 2:
            scale += float(torch.rand(()))
            self.drawn(batch_idx, scale)
        return scale * (self(batch[0]).mean(1) - batch[1]).abs().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def test_from_the_first_noise_on_both_halves_draw_alike(make_trainer: MakeTrainer) -> None:
    drawn: dict[int, list[float]] = {}
    trainer = make_trainer(ManifoldMixupCallback(layers="input", schedule=None))
    trainer.fit(DrawsLater(drawn), Batches([(X, Y)] * 6))
    own_and_partners = [drawn[step] for step in (3, 4, 5)]  # the first noise comes as a surprise
    assert [len(numbers) for numbers in own_and_partners] == [2, 2, 2]
    assert [numbers[0] for numbers in own_and_partners] == [numbers[1] for numbers in own_and_partners]
    assert len({numbers[0] for numbers in own_and_partners}) == 3


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({1, 2}, id="set"),
        pytest.param([1, 2], id="list"),
        pytest.param({"a": 1}, id="dict"),
        pytest.param(collections.deque([1, 2]), id="deque"),
        pytest.param([{"a": {1}}], id="nested"),
    ],
)
def test_contents_are_put_back(value: Any) -> None:
    before, contents = copy.deepcopy(value), Contents(value)
    assert not contents.have_changed()
    contents.restore()
    assert value == before
    inner = value[0]["a"] if isinstance(value, list) and isinstance(value[0], dict) else value
    (inner.update({"b": 2} if isinstance(inner, dict) else {9}) if hasattr(inner, "update") else inner.append(9))
    assert contents.have_changed()
    contents.restore()
    assert value == before


def test_a_list_that_has_only_grown_is_told_from_one_that_has_changed_otherwise() -> None:
    def change(*steps: Callable[[list[Any]], Any]) -> Contents:
        value: list[Any] = [[1], 2]
        contents = Contents(value)
        for step in steps:
            step(value)
        return contents

    assert change(lambda x: x.append(3)).has_only_grown()
    assert change(lambda x: x.append([3])).has_only_grown()
    assert not change(lambda x: x.append(3), lambda x: x[0].append(9)).has_only_grown()
    assert not change(lambda x: x.insert(0, 3)).has_only_grown()
    assert not change(lambda x: x.pop()).has_only_grown()


def test_values_of_both_halves_are_interpolated_if_they_are_numbers_and_differ() -> None:
    metric = MeanMetric()
    assert between(metric, metric, 0.25) is metric
    assert between("a", "b", 0.25) == "a"
    assert (between(True, False, 0.25), between(3, 3, 0.25)) == (True, 3)
    assert type(between(3, 3, 0.3)) is int
    assert between(8.0, 4.0, 0.25) == 0.25 * 8 + 0.75 * 4
    assert between({"a": 8.0, "b": 1}, {"a": 4.0}, 0.25) == {"a": 5.0, "b": 1}
    assert between(torch.tensor(8.0), torch.tensor(4.0), torch.tensor(0.25, dtype=torch.float64)).dtype == torch.float32
    assert between(torch.tensor(float("inf")), torch.tensor(float("inf")), 0.25) == float("inf")
