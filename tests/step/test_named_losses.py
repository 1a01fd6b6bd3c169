"""Losses named with ``loss=...``: how they are found, mixed exactly, and put back; all else stays unmixed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import LAYERS, Classifier, Network, Plans, batches, loader, mixed_logits, mixup
from torch import Tensor, nn
from torch.nn.functional import multi_margin_loss as margin
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_hinge_loss as hinge

from mm_lightning import ManifoldMixupCallback, MixPlan

MakeTrainer = Callable[..., pl.Trainer]
Loss = Callable[[Tensor, Tensor], Tensor]


def picked(logits: Tensor, targets: Tensor) -> Tensor:
    """Looks the classes up in Python, where nobody can follow, and is not linear in anything."""
    log_probs = logits.log_softmax(dim=1)
    return torch.stack([(1 + t) * log_probs[i, t] for i, t in enumerate(targets.tolist())]).square().mean()


def by_numpy(logits: Tensor, targets: Tensor) -> Tensor:
    wanted = torch.from_numpy(targets.numpy().astype("float64"))
    return (logits.sum(dim=1) - wanted).abs().mean()


class Picked(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return picked(logits, targets)


class Net(Classifier):
    """Has a loss everywhere that one can stand; ``compute`` uses some of them."""

    def __init__(self, compute: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.criterion = Picked()
        self.parts = nn.ModuleDict({"criterion": Picked()})
        self.function = picked
        self.holder = SimpleNamespace(loss=picked)

    def method(self, logits: Tensor, targets: Tensor) -> Tensor:
        return picked(logits, targets)

    def whole(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(x), targets)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.compute(self, self(batch[0]), batch[1])


class Step(NamedTuple):
    plan: MixPlan
    net: Network
    loss: Tensor
    grads: list[Tensor]


class Steps(pl.Callback):
    """Keeps the weights, the loss and the gradients of every step."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback = callback
        self.steps: list[Step] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.loss = loss.detach().clone()

    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        assert self.callback.plan is not None
        net = Network()
        for kept, current in zip(net.parameters(), pl_module.parameters(), strict=True):
            kept.data = current.detach().clone()
        grads = [parameter.grad.clone() for parameter in pl_module.parameters() if parameter.grad is not None]
        self.steps.append(Step(self.callback.plan, net, self.loss, grads))


def check(make_trainer: MakeTrainer, net: Net, spec: Any, losses: dict[Loss, bool]) -> None:
    """Train, and compare each step with the sum of ``losses`` by hand, of which those that say so are mixed."""
    callback = mixup(loss=spec)
    steps = Steps(callback)
    make_trainer(callback, steps).fit(net, loader())
    for step, (x, y) in zip(steps.steps, batches(), strict=True):
        logits, lam = mixed_logits(step.net, x, step.plan), step.plan.lam[0].double()
        wanted = torch.zeros((), dtype=torch.float64)
        for loss, is_mixed in losses.items():
            own = loss(logits, y)
            wanted = wanted + (lam * own + (1 - lam) * loss(logits, y[step.plan.partner]) if is_mixed else own)
        assert_close(step.loss, wanted.detach(), rtol=0, atol=1e-12)
        assert_close(step.grads, list(torch.autograd.grad(wanted, list(step.net.parameters()))), rtol=0, atol=1e-12)
    assert {step.plan.layer for step in steps.steps} <= set(LAYERS)
    assert min(float(step.plan.lam[0]) for step in steps.steps) < 0.9  # or there was nothing to mix


@pytest.mark.parametrize(
    ("spec", "compute"),
    [
        pytest.param("criterion", lambda net, logits, y: net.criterion(logits, y), id="module attribute"),
        pytest.param("parts.criterion", lambda net, logits, y: net.parts["criterion"](logits, y), id="dotted"),
        pytest.param("holder.loss", lambda net, logits, y: net.holder.loss(logits, y), id="of a plain object"),
        pytest.param("function", lambda net, logits, y: net.function(logits, y), id="function attribute"),
        pytest.param("method", lambda net, logits, y: net.method(logits, y), id="method by name"),
        pytest.param(picked, lambda net, logits, y: picked(logits, y), id="global function"),
        pytest.param(picked, lambda net, logits, y: net.function(logits, targets=y), id="function and keyword"),
    ],
)
def test_a_loss_is_found_wherever_it_stands(
    make_trainer: MakeTrainer, spec: Any, compute: Callable[[Net, Tensor, Tensor], Tensor]
) -> None:
    check(make_trainer, Net(compute), spec, {picked: True})


@pytest.mark.parametrize("attribute", ["criterion", "method"])
def test_a_loss_is_found_by_the_object(make_trainer: MakeTrainer, attribute: str) -> None:
    net = Net(lambda net, logits, y: getattr(net, attribute)(logits, y))
    check(make_trainer, net, getattr(net, attribute), {picked: True})


@pytest.mark.parametrize(
    "loss", [hinge, margin, F.cross_entropy, by_numpy], ids=["hinge", "imported", "cross_entropy", "numpy"]
)
def test_a_function_is_found_where_the_class_is_defined(make_trainer: MakeTrainer, loss: Loss) -> None:
    names: dict[Loss, Any] = {
        hinge: lambda net, logits, y: hinge(logits, y, num_classes=3),
        margin: lambda net, logits, y: margin(logits, y),
        F.cross_entropy: lambda net, logits, y: F.cross_entropy(logits, y),
        by_numpy: lambda net, logits, y: by_numpy(logits, y),
    }
    by_hand = partial(hinge, num_classes=3) if loss is hinge else loss
    check(make_trainer, Net(names[loss]), loss, {by_hand: True})


def test_cross_entropy_is_found_inside_a_loss_module(make_trainer: MakeTrainer) -> None:
    net = Net(lambda net, logits, y: net.criterion(logits, y))
    net.criterion = nn.CrossEntropyLoss()
    check(make_trainer, net, F.cross_entropy, {F.cross_entropy: True})


def test_two_losses_are_mixed_and_another_is_not(make_trainer: MakeTrainer) -> None:
    net = Net(lambda net, logits, y: net.criterion(logits, y) + by_numpy(logits, y) + F.cross_entropy(logits, y))
    check(make_trainer, net, ["criterion", by_numpy], {picked: True, by_numpy: True, F.cross_entropy: False})


def test_a_named_loss_may_call_another(make_trainer: MakeTrainer) -> None:
    check(make_trainer, Net(lambda net, logits, y: net.criterion(logits, y)), ["criterion", picked], {picked: True})


@pytest.mark.parametrize("fails", [False, True], ids=["fit", "exception"])
def test_everything_is_put_back(make_trainer: MakeTrainer, fails: bool) -> None:
    def compute(net: Net, logits: Tensor, y: Tensor) -> Tensor:
        assert not fails or net.trainer.global_step < 2, "now"
        return by_numpy(logits, y) + net.function(logits, y) + net.criterion(logits, y) + net.method(logits, y)

    net = Net(compute)
    before = [dict(vars(net)), dict(vars(net.criterion)), dict(vars(F)), dict(globals())]
    trainer = make_trainer(mixup(loss=[by_numpy, "function", "criterion", "method", F.cross_entropy]))
    if fails:
        with pytest.raises(AssertionError, match="now"):
            trainer.fit(net, loader())
    else:
        trainer.fit(net, loader())
    for was, now in zip(before, [vars(net), vars(net.criterion), vars(F), globals()], strict=True):
        assert was.keys() ^ now.keys() <= {"_trainer", "_hparams"}
        assert [name for name in ("by_numpy", "function", "cross_entropy") if was.get(name) is not now.get(name)] == []
    assert "forward" not in vars(net.criterion)
    assert "method" not in vars(net)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("criterium", ValueError, "loss='criterium' is no attribute of Net"),
        ("parts.nothing.loss", ValueError, "loss='parts.nothing.loss' is no attribute of Net"),
        ("lr", TypeError, "loss='lr' is a float, which cannot be called"),
        ([3], TypeError, "loss must be an attribute's name, a loss module, a function or a list of these, got 3"),
        (lambda logits, y: logits.sum(), ValueError, r"loss=<lambda> was found neither as an attribute of Net nor"),
    ],
    ids=["no attribute", "dotted", "not callable", "no function", "not found"],
)
def test_a_loss_that_is_not_there_is_refused(
    make_trainer: MakeTrainer, spec: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(mixup(loss=spec)).fit(Net(lambda net, logits, y: picked(logits, y)), loader())


@pytest.mark.parametrize("layer", ["input", "first"])
def test_a_loss_that_runs_the_network_is_mixed(make_trainer: MakeTrainer, layer: str) -> None:
    class Whole(Net):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self.whole(*batch)

    callback, net = mixup(loss="whole", layers=layer), Whole(lambda net, logits, y: logits)
    steps = Steps(callback)
    make_trainer(callback, steps).fit(net, loader())
    for step, (x, y) in zip(steps.steps, batches(), strict=True):
        logits, lam = mixed_logits(step.net, x, step.plan), step.plan.lam[0].double()
        own, partners = F.cross_entropy(logits, y), F.cross_entropy(logits, y[step.plan.partner])
        assert_close(step.loss, (lam * own + (1 - lam) * partners).detach(), rtol=0, atol=1e-12)


def test_a_named_loss_takes_targets_from_anywhere(make_trainer: MakeTrainer) -> None:
    net = Net(lambda net, logits, y: net.criterion(logits, torch.tensor(y.tolist())))
    check(make_trainer, net, "criterion", {picked: True})


def test_a_named_loss_that_is_not_called_is_refused(make_trainer: MakeTrainer) -> None:
    net = Net(lambda net, logits, y: F.cross_entropy(logits, y))
    with pytest.raises(RuntimeError, match="loss=criterion was not called in training_step"):
        make_trainer(mixup(loss="criterion")).fit(net, loader())


class OwnCall(nn.Module):
    """Defines ``__call__``, as the losses of some libraries do."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return picked(logits, targets)


@pytest.mark.parametrize("spec", ["own_call", None], ids=["named", "not named"])
def test_a_loss_module_with_a_call_of_its_own_is_mixed(make_trainer: MakeTrainer, spec: Any) -> None:
    net = Net(lambda net, logits, y: net.own_call(logits, targets=y))
    net.own_call = OwnCall()
    check(make_trainer, net, spec, {picked: True})


# --- steps that need it


class Gan(pl.LightningModule):
    """A discriminator that also classifies, against a generator of fixed noise."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk, self.validity, self.classes = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 3)
        self.generator = nn.Linear(2, 4)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.noise = torch.randn(8, 2, generator=generator, dtype=torch.float64)

    def adversarial(self, x: Tensor, is_real: float) -> Tensor:
        validity = self.validity(torch.tanh(self.trunk(x)))
        return F.binary_cross_entropy_with_logits(validity, torch.full_like(validity, is_real))

    def classification(self, logits: Tensor, targets: Tensor) -> Tensor:
        return picked(logits, targets)

    def discriminate(self, x: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        fake = self.adversarial(self.generator(self.noise).detach(), 0.0)
        real = self.adversarial(x, 1.0)
        return fake + real + classify(self.classes(hidden))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.discriminate(x, lambda logits: self.classification(logits, y)))
        first.step()
        second.zero_grad()
        self.manual_backward(self.adversarial(self.generator(self.noise), 1.0))
        second.step()

    def configure_optimizers(self) -> Any:
        discriminator = [*self.trunk.parameters(), *self.validity.parameters(), *self.classes.parameters()]
        return [torch.optim.SGD(discriminator, lr=0.1), torch.optim.SGD(self.generator.parameters(), lr=0.1)]


def test_gan_mixes_the_classification_loss_alone(make_trainer: MakeTrainer) -> None:
    callback, net, wanted = mixup(layers="input", loss="classification"), Gan(), Gan()
    plans = Plans(callback)
    make_trainer(callback, plans).fit(net, loader())
    first, second = wanted.configure_optimizers()
    for plan, (x, y) in zip(plans.plans, batches(), strict=True):
        lam, partner = plan.lam[0].double(), plan.partner

        def classify(logits: Tensor, y: Tensor = y, lam: Tensor = lam, partner: Tensor = partner) -> Tensor:
            return lam * picked(logits, y) + (1 - lam) * picked(logits, y[partner])

        first.zero_grad()
        wanted.discriminate(lam * x + (1 - lam) * x[partner], classify).backward()
        first.step()
        second.zero_grad()
        wanted.adversarial(wanted.generator(wanted.noise), 1.0).backward()
        second.step()
    assert_close(list(net.parameters()), list(wanted.parameters()), rtol=0, atol=1e-12)
    assert not torch.equal(net.trunk.weight, Gan().trunk.weight)


class Distilled(pl.LightningModule):
    """A student that learns what a frozen teacher says of the same rows."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Network(), Network()
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.mul_(-1.5)
        self.teacher.requires_grad_(False)

    def distillation(self, logits: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
        soft = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="batchmean")
        return soft.square() + picked(logits, targets)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            taught = self.teacher(x)
        return self.distillation(self.student(x), taught, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def test_student_learns_from_the_teacher_of_both_rows(make_trainer: MakeTrainer) -> None:
    callback, net, wanted = mixup(layers="student.first", loss="distillation"), Distilled(), Distilled()
    plans = Plans(callback)
    make_trainer(callback, plans).fit(net, loader())
    optimizer = wanted.configure_optimizers()
    for plan, (x, y) in zip(plans.plans, batches(), strict=True):
        lam, partner, student = plan.lam[0].double(), plan.partner, wanted.student
        hidden = student.first(x)
        hidden = lam * hidden + (1 - lam) * hidden[partner]
        logits, taught = student.head(torch.tanh(student.second(torch.tanh(hidden)))), wanted.teacher(x)
        own = wanted.distillation(logits, taught, y)
        loss = lam * own + (1 - lam) * wanted.distillation(logits, taught[partner], y[partner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(list(net.parameters()), list(wanted.parameters()), rtol=0, atol=1e-12)
    assert not torch.equal(net.student.first.weight, Network().first.weight)
