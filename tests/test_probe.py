"""The look at a training step: it leaves nothing behind, and tells targets, inputs and masks apart."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier import LR, Network, Plans, mixed_loss, mixup, rows
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import MeanMetric

import mm_lightning
from mm_lightning import ManifoldMixupCallback
from mm_lightning.probe import Roles, View, look_at, signature_of

MakeTrainer = Callable[..., pl.Trainer]
X, Y = rows(6)
ONE_ROW = "ignore:A batch of one row has no partner"


class Batches(list[Any]):
    """A plain loader of given batches."""


class Net(Network, pl.LightningModule):
    """The classifier with a step that a test hands in."""

    def __init__(self, step: Callable[[Any, Any], Any], lr: float = LR) -> None:
        super().__init__()
        self.step, self.lr = step, lr
        self.table = nn.Embedding(5, 4, dtype=torch.float64)
        self.wide = nn.Linear(7, 8, dtype=torch.float64)
        self.gate = nn.Linear(8, 8, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def plain(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def look(step: Callable[[Any, Any], Any], batch: Any) -> View:
    net = Net(step)
    net.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return look_at(net, net.training_step, (batch, 0), {}, 6)


def fit(make_trainer: MakeTrainer, step: Callable[[Any, Any], Any], batch: Any, **settings: Any) -> tuple[Any, ...]:
    """Fit three batches without moving the weights; the module, and each batch's loss and plan."""
    callback = mixup(**settings)
    net, plans, losses = Net(step, lr=0.0), Plans(callback), []
    net.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"])  # type: ignore
    make_trainer(callback, plans).fit(net, Batches([batch] * 3))
    return net, list(zip(losses, plans.plans, strict=True))


# ---------------------------------------------------------------------------------------------- nothing is left behind


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
@pytest.mark.parametrize("has_logger", [False, True], ids=["no-logger", "logger"])
@pytest.mark.parametrize("how", ["inspected", "off", "looked-at"])
@pytest.mark.filterwarnings(ONE_ROW)
def test_training_goes_on_as_if_nobody_had_looked(
    make_trainer: MakeTrainer, is_manual: bool, has_logger: bool, how: str
) -> None:
    # Batches of one row are looked at, and trained unmixed.
    data = Batches([(X[i : i + 1], Y[i : i + 1]) if how == "looked-at" else (X, Y) for i in range(4)])
    found = []
    for with_look in (False, True):
        seed()
        module, logger = Busy(is_manual), Kept()
        if with_look and how == "inspected":
            mm_lightning.inspect(module, data[0])
        callback = ManifoldMixupCallback(alpha=0.0 if how == "off" else 1.0, layers="first")
        callbacks = [callback] if with_look and how != "inspected" else []
        trainer = make_trainer(*callbacks, logger=logger if has_logger else False, max_epochs=2)
        trainer.fit(module, data)
        assert module.counter == 8
        assert len(logger.own.values) == (8 if has_logger else 0)
        own = {key: value for key, value in trainer.callback_metrics.items() if "mixup" not in key}
        optimizer = trainer.optimizers[0].state_dict()
        found.append((module.state(), optimizer, own, logger.own.values, trainer.lr_scheduler_configs[0].scheduler))
    schedulers = [states[-1].state_dict() for states in found]
    assert_same(found[1][:-1], found[0][:-1])
    assert_same(*schedulers)


def test_a_look_that_raises_leaves_the_module_as_it_was() -> None:
    class Broken(Busy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise OSError("no such file")

    seed()
    module = Broken()
    before = module.state()
    with pytest.raises(OSError, match="no such file"):
        mm_lightning.inspect(module, (X, Y))
    assert_same(module.state(), before)


# --------------------------------------------------------------------------------------------------------------- roles

IDS = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 4, 1], [2, 0, 0], [1, 1, 0], [2, 3, 4]])
MASK = (IDS > 0).long()


def _weighted(net: Net, batch: Any) -> Tensor:
    losses = F.cross_entropy(net(batch["x"]), batch["y"], reduction="none")
    return (losses * batch["weight"]).sum() / batch["weight"].sum()


def _autoencoder(net: Net, batch: Any) -> Tensor:
    return F.mse_loss(net.first(batch[0])[:, :4], batch[0])


def _tokens(net: Net, batch: Any) -> Tensor:
    mask = batch["mask"].unsqueeze(-1)
    hidden = (net.table(batch["ids"]) * mask).sum(dim=1) / mask.sum(dim=1)
    return F.cross_entropy(net(hidden), batch["labels"])


def _categorical(net: Net, batch: Any) -> Tensor:
    x, kind, y = batch
    hidden = net.wide(torch.cat([x, F.one_hot(kind, 3).double()], dim=1))
    return F.cross_entropy(net.head(torch.tanh(net.second(torch.tanh(hidden)))), y)


BINARY = (X > 0).double()


@pytest.mark.parametrize(
    ("step", "batch", "targets", "inputs", "masks", "is_input_mixable"),
    [
        pytest.param(plain, (X, Y), {1}, {0}, set(), True, id="classifier"),
        pytest.param(_weighted, {"weight": X[:, 0], "x": X, "y": Y}, {0, 2}, {1}, set(), True, id="weights"),
        pytest.param(_autoencoder, (X, Y), {0}, {0}, set(), True, id="autoencoder"),
        pytest.param(_tokens, {"ids": IDS, "mask": MASK, "labels": Y}, {2}, {0}, {1}, True, id="tokens"),
        pytest.param(_categorical, (X, Y, Y), {2}, {0, 1}, set(), False, id="categorical"),
        pytest.param(plain, (BINARY, Y), {1}, {0}, set(), True, id="binary"),
    ],
)
def test_roles(
    step: Any, batch: Any, targets: set[int], inputs: set[int], masks: set[int], is_input_mixable: bool
) -> None:
    view = look(step, batch)
    roles: Roles = view.roles
    assert (roles.targets, roles.inputs, roles.masks) == (targets, inputs, masks)
    assert (view.input_problem == "") is is_input_mixable
    assert view.has_loss


def test_binary_inputs_are_mixed_once(make_trainer: MakeTrainer) -> None:
    net, steps = fit(make_trainer, plain, (BINARY, Y), layers="input")
    for loss, plan in steps:
        assert_close(loss, mixed_loss(net, BINARY, Y, plan).detach(), rtol=0, atol=1e-12)


def test_categorical_inputs_refuse_the_layer_input(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="Layer 'input' cannot be mixed: integers of the batch enter the network"):
        fit(make_trainer, _categorical, (X, Y, Y), layers="input")


def test_a_step_without_a_loss_has_none() -> None:
    assert not look(lambda net, batch: None, (X, Y)).has_loss


def test_signatures_tell_batches_apart() -> None:
    batches = [
        (X, Y),
        (Y, X),
        (X.float(), Y),
        (X[:, 0], Y),
        (X,),
        {"x": X, "y": Y},
        {"y": Y, "x": X},
        {"x": X, "z": Y},
        ({"x": X}, Y),
        (X, "a"),
    ]
    assert len({signature_of(batch) for batch in batches}) == len(batches)
    assert signature_of({"x": X, "y": Y}) == signature_of({"x": X[:3] * 2, "y": Y[:3]})
    assert signature_of([X, "a"]) == signature_of((X, "b"))


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "take_out",
    [
        pytest.param(lambda y: torch.from_numpy(y.numpy().copy()), id="numpy"),
        pytest.param(lambda y: torch.as_tensor(y.tolist()), id="tolist"),
        pytest.param(lambda y: torch.tensor(y), id="torch.tensor", marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_targets_taken_out_beside_another_loss_are_refused(make_trainer: MakeTrainer, take_out: Any) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        logits = net(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.multi_margin_loss(logits, take_out(batch[1]))

    with pytest.raises(RuntimeError, match="The loss of training_step cannot be followed"):
        fit(make_trainer, step, (X, Y), layers="first")


def test_captions_are_no_loss(make_trainer: MakeTrainer) -> None:
    captions, names = [], ["cat", "dog", "cow"]

    def step(net: Net, batch: Any) -> Tensor:
        captions.append(names[int(batch[1][0])])
        return plain(net, batch)

    net, steps = fit(make_trainer, step, (X, Y), layers="first")
    assert captions[-3:] == [names[int(Y[0])]] * 3
    for loss, plan in steps:
        assert_close(loss, mixed_loss(net, X, Y, plan).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("take", [Tensor.requires_grad_, lambda x: x.clone().requires_grad_()], ids=["own", "clone"])
@pytest.mark.parametrize("layer", ["input", "first"])
def test_gradient_penalties_are_exact(make_trainer: MakeTrainer, layer: str, take: Any) -> None:
    def penalty(logits: Tensor, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        return slope.square().sum(dim=1).mean()

    def step(net: Net, batch: Any) -> Tensor:
        x = take(batch[0])
        logits = net(x)
        return F.cross_entropy(logits, batch[1]) + penalty(logits, x)

    net, steps = fit(make_trainer, step, (X.clone(), Y), layers=layer)
    for loss, plan in steps:
        lam, partner = float(plan.lam[0]), plan.partner
        mix = lambda h: lam * h + (1 - lam) * h[partner]  # noqa: B023, E731
        x = (mix(X) if layer == "input" else X.clone()).requires_grad_()
        hidden = net.first(x) if layer == "input" else mix(net.first(x))
        logits = net.head(torch.tanh(net.second(torch.tanh(hidden))))
        wanted = lam * F.cross_entropy(logits, Y) + (1 - lam) * F.cross_entropy(logits, Y[partner])
        assert_close(loss, (wanted + penalty(logits, x)).detach(), rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- layers


def test_auto_names_what_is_missing_where_nothing_is_safe(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        return F.cross_entropy(F.one_hot(batch[0], 7).double() @ net.wide.weight.T, batch[1])

    with pytest.raises(ValueError, match="layers='auto' found no layer of Net that everything runs through"):
        fit(make_trainer, step, (Y, Y), layers="auto")


def test_auto_trains_as_the_same_layers_by_name(make_trainer: MakeTrainer) -> None:
    nets, layers = [], "auto"
    for _ in range(2):
        torch.manual_seed(0)
        net, callback = Net(plain), ManifoldMixupCallback(alpha=1.0, layers=layers, seed=5)
        make_trainer(callback).fit(net, Batches([(X, Y)] * 12))
        nets.append(net)
        assert callback.layer_names == ("input", "first")
        assert min(callback.summary()[name] for name in callback.layer_names) > 0
        layers = list(callback.layer_names)
    assert mm_lightning.inspect(nets[0], (X, Y)).chosen == tuple(layers)
    assert all(torch.equal(one, other) for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def _around(net: Net, batch: Any) -> Tensor:
    hidden = net.first(batch[0])
    return F.cross_entropy(net.head(hidden + net.second(torch.tanh(net.gate(hidden)))), batch[1])


def test_strict_refuses_a_layer_with_a_way_around_it(make_trainer: MakeTrainer) -> None:
    path = "a path from 'first' to 'head' leads around it"
    with pytest.raises(ValueError, match=f"Layer 'second' cannot be mixed: {path}"):
        fit(make_trainer, _around, (X, Y), layers="second", strict=True)
    with pytest.warns(UserWarning, match=f"Layer 'second' is mixed, but {path}"):
        fit(make_trainer, _around, (X, Y), layers="second")
    fit(make_trainer, _around, (X, Y), layers="first", strict=True)


@pytest.mark.parametrize("without_graph", [False, True], ids=["frozen", "no_grad"])
@pytest.mark.parametrize("layer", ["input", "first", "second"])
def test_a_frozen_backbone_is_mixed(make_trainer: MakeTrainer, without_graph: bool, layer: str) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        net.first.requires_grad_(False)
        net.second.requires_grad_(False)
        with torch.set_grad_enabled(not without_graph):
            hidden = torch.tanh(net.second(torch.tanh(net.first(batch[0]))))
        return F.cross_entropy(net.head(hidden), batch[1])

    net, steps = fit(make_trainer, step, (X, Y), layers=layer)
    for loss, plan in steps:
        assert plan.layer == layer
        assert_close(loss, mixed_loss(net, X, Y, plan).detach(), rtol=0, atol=1e-12)
