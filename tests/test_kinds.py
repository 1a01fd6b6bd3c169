"""Kinds of steps that are hard to mix: each is exact, against values worked out by hand in float64, or refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier import Plans
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import Metric

import mm_lightning
from mm_lightning import ManifoldMixupCallback, MixPlan

MakeTrainer = Callable[..., pl.Trainer]
GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(8, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 1, 2, 0, 0, 1])
R = torch.randn(8, generator=GENERATOR, dtype=torch.float64)
EDGE = "would not mix features and targets alike"


class Batches(list[Any]):
    """A plain loader of given batches."""


class Net(pl.LightningModule):
    """6-8-8-3 with tanh, float64, whose step a test hands in. It stays where it is."""

    def __init__(self, step: Callable[[Any, Any], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        for name, part in parts.items():
            self.add_module(name, part)
        self.double()
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def mixed(self, x: Tensor, plan: MixPlan) -> Tensor:
        """The forward pass by hand."""
        x = mix(x, plan) if plan.layer == "input" else x
        for name in ("first", "second"):
            hidden = getattr(self, name)(x)
            x = torch.tanh(mix(hidden, plan) if plan.layer == name else hidden)
        return self.head(x)


class Steps(pl.Callback):
    """Keeps the loss and the gradients of every batch."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.grads: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())

    def on_after_backward(self, trainer: Any, module: pl.LightningModule) -> None:
        self.grads.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})


def mix(hidden: Tensor, plan: MixPlan, dim: int = 0) -> Tensor:
    lam = float(plan.lam[0])
    return lam * hidden + (1 - lam) * hidden.index_select(dim, plan.partner)


def train(
    make_trainer: MakeTrainer, net: pl.LightningModule, batches: list[Any], layers: Any, **settings: Any
) -> tuple[list[tuple[MixPlan, Tensor]], Steps]:
    callback = ManifoldMixupCallback(**{"alpha": 1.0, "seed": 3, "layers": layers, "schedule": None, **settings})
    plans, steps = Plans(callback), Steps()
    make_trainer(callback, plans, steps, log_every_n_steps=1).fit(net, Batches(batches))
    assert plans.plans[0].mixes
    return list(zip(plans.plans, steps.losses, strict=True)), steps


def assert_exact(
    make_trainer: MakeTrainer,
    net: Net,
    batch: Any,
    layers: Any,
    own: Callable[[Any, MixPlan], Tensor],
    partners: Callable[[Any, MixPlan], Tensor],
    **settings: Any,
) -> None:
    """Train on a batch, and compare losses and gradients with the interpolation of two losses by hand."""
    found, steps = train(make_trainer, net, [batch] * 4, layers, **settings)
    for (plan, loss), grads in zip(found, steps.grads, strict=True):
        lam = float(plan.lam[0])
        wanted = lam * own(net, plan) + (1 - lam) * partners(net, plan)
        assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)
        named = [(name, parameter) for name, parameter in net.named_parameters() if name in grads]
        found_grads = torch.autograd.grad(wanted, [parameter for _, parameter in named], allow_unused=True)
        for (name, parameter), grad in zip(named, found_grads, strict=True):
            assert_close(grads[name], torch.zeros_like(parameter) if grad is None else grad, rtol=0, atol=1e-12)


def assert_refused(make_trainer: MakeTrainer, net: Any, batch: Any, layers: Any, message: str, **settings: Any) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        train(make_trainer, net, [batch] * 2, layers, **settings)


# ------------------------------------------------------------------------------------------------------ order of rows


ORDER = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])


@pytest.mark.parametrize(
    "reorder",
    [
        pytest.param(lambda x: ORDER, id="shuffle"),
        pytest.param(lambda x: x[:, 0].argsort(), id="sort"),
        pytest.param(lambda x: torch.arange(8).flip(0), id="flip"),
        pytest.param(lambda x: torch.tensor([0, 0, 1, 1, 2, 3, 4, 5]), id="sample"),
    ],
)
def test_rows_that_the_step_reorders_are_mixed_at_the_input_alone(make_trainer: MakeTrainer, reorder: Any) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        rows = reorder(batch[0])
        return F.mse_loss(net(batch[0][rows])[:, 0], batch[1][rows])

    assert_refused(make_trainer, Net(step), (X, R), "first", f"Layer 'first' cannot be mixed: its rows are not|{EDGE}")

    def half(net: Net, plan: MixPlan, targets: Tensor) -> Tensor:
        x = mix(X, plan)
        rows = reorder(x)
        return F.mse_loss(net(x[rows])[:, 0], targets[rows])

    if reorder(X).equal(reorder(mix(X, MixPlan("input", ORDER, torch.full((8,), 0.3))))):  # not by what is mixed
        own, partners = (lambda net, plan: half(net, plan, R)), (lambda net, plan: half(net, plan, R[plan.partner]))
        assert_exact(make_trainer, Net(step), (X, R), "input", own, partners)


def test_own_mixup_is_mixed_at_the_input_alone(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        x, t = batch[0], F.one_hot(batch[1], 3).double()
        x, t = 0.7 * x + 0.3 * x.flip(0), 0.7 * t + 0.3 * t.flip(0)
        return -(t * net(x).log_softmax(1)).sum(1).mean()

    def half(net: Net, plan: MixPlan, y: Tensor) -> Tensor:
        return step(net, (mix(X, plan), y))

    assert_refused(make_trainer, Net(step), (X, Y), "first", "the step shuffles, samples or mixes rows itself")
    assert_exact(
        make_trainer, Net(step), (X, Y), "input", lambda n, p: half(n, p, Y), lambda n, p: half(n, p, Y[p.partner])
    )


def test_several_samples_for_a_row_are_refused(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0].repeat_interleave(2, dim=0)), batch[1].repeat_interleave(2))

    assert_refused(make_trainer, Net(step), (X, Y), "first", r"with the 8 rows in dimension 0: \(16, 8\)")


def test_targets_without_rows_are_refused(make_trainer: MakeTrainer) -> None:
    boxes = torch.tensor([[0, 1], [0, 2], [2, 0], [5, 1], [7, 2]])  # row and class of each object

    def step(net: Net, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0])[batch[1][:, 0]], batch[1][:, 1])

    for layers in ("input", "auto"):
        assert_refused(make_trainer, Net(step), (X, boxes), layers, "has no row for each of the 8 rows")


# --------------------------------------------------------------------------------------------- which dimension is rows


class TimeMajor(pl.LightningModule):
    """Turns batches round, as many networks do."""

    def __init__(self, cell: str, layers: int = 1, both: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 6)
        self.rnn = getattr(nn, cell)(6, 8, layers, bidirectional=both)
        self.head = nn.Linear(8, 3)
        self.double()

    def hidden(self, x: Tensor) -> Any:
        return self.rnn(self.embed(x).transpose(0, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state = self.hidden(batch[0])[1]
        return F.cross_entropy(self.head((state[0] if isinstance(state, tuple) else state)[-1]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("cell", "layers", "both", "n"), [("GRU", 2, False, 2), ("LSTM", 2, True, 4), ("GRU", 1, True, 5)]
)
def test_a_state_is_mixed_along_its_rows(make_trainer: MakeTrainer, cell: str, layers: int, both: bool, n: int) -> None:
    # As many rows as layers and directions of the network, or as steps in time.
    net = TimeMajor(cell, layers, both)
    x, y = torch.randn(n, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(n) % 3
    for plan, loss in train(make_trainer, net, [(x, y)] * 3, "rnn")[0]:
        state = net.hidden(x)[1]
        state = mix(state[0] if isinstance(state, tuple) else state, plan, dim=1)
        logits, lam = net.head(state[-1]), float(plan.lam[0])
        wanted = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[plan.partner])
        assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [7, 5], ids=["other", "as long as it is wide"])
def test_time_major_batches_with_lengths_are_mixed_along_their_rows(make_trainer: MakeTrainer, n: int) -> None:
    x, y = torch.randn(5, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(n) % 3
    lengths = torch.tensor([5, 3, 4, 2, 5, 1, 3])[:n]

    def logits_of(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
        kept = (torch.arange(5)[:, None] < lengths).double()[..., None]  # (T, N, 1)
        return net.head((torch.tanh(x) * kept).sum(0) / kept.sum(0))

    def step(net: Net, batch: Any) -> Tensor:
        return F.cross_entropy(logits_of(net, net.first(batch[0]), batch[2]), batch[1])

    def half(net: Net, plan: MixPlan, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(net, mix(net.first(x), plan, dim=1), lengths), y)

    assert_exact(
        make_trainer,
        Net(step),
        (x, y, lengths),
        "first",
        lambda net, plan: half(net, plan, y),
        lambda net, plan: half(net, plan, y[plan.partner]),
    )


# ------------------------------------------------------------------------------------------------------ ways around it


class Adapted(Net):
    """Embedded tokens, frozen or not, in a residual stream with an adapter."""

    def __init__(self, is_frozen: bool) -> None:
        super().__init__(lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
        self.table = nn.Embedding(9, 8, dtype=torch.float64).requires_grad_(not is_frozen)
        self.base = nn.Linear(8, 8, dtype=torch.float64).requires_grad_(not is_frozen)
        self.down, self.up = nn.Linear(8, 2, dtype=torch.float64), nn.Linear(2, 8, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids).mean(1)
        hidden = hidden + torch.tanh(self.base(hidden) + self.up(self.down(hidden)))
        return self.head(torch.tanh(self.second(hidden)))


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
def test_no_layer_inside_of_a_residual_stream_is_safe(is_frozen: bool) -> None:
    ids = torch.randint(0, 9, (8, 5), generator=torch.Generator().manual_seed(2))
    report = {layer.name: layer for layer in mm_lightning.inspect(Adapted(is_frozen), (ids, Y)).layers}
    assert [name for name in ("base", "down", "up") if report[name].safe] == []
    assert all("leads around it" in report[name].reason for name in ("base", "down", "up"))
    assert report["input"].safe and report["table"].safe and report["second"].safe  # noqa: PT018


class Reversible(nn.Module):
    """Takes a scale away, and gives it back (Kim et al., 2022)."""

    def __init__(self, is_buffer: bool) -> None:
        super().__init__()
        self.is_buffer = is_buffer
        self.register_buffer("scale", torch.ones(8, 1, dtype=torch.float64))

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        if back:
            return x * self.scale
        scale = x.abs().mean(1, keepdim=True)
        if self.is_buffer:
            self.scale.copy_(scale)
        else:
            self.scale = scale
        return x / scale


def _scaled(net: Net, batch: Any) -> Tensor:
    scale = batch[0].abs().mean(1, keepdim=True)
    return F.l1_loss((net(batch[0] / scale) * scale)[:, 0], batch[1])


def _shifted(net: Net, batch: Any) -> Tensor:
    x = batch[0].clone()
    last = x[:, -1:].clone()
    x -= last
    return F.l1_loss((net(x) + last)[:, 0], batch[1])


def _skipped(net: Net, batch: Any) -> Tensor:
    return F.l1_loss((net(batch[0]) + batch[0][:, :3])[:, 0], batch[1])


def _reversed(net: Any, batch: Any) -> Tensor:
    return F.l1_loss(net.reversible(net(net.reversible(batch[0])), back=True)[:, 0], batch[1])


@pytest.mark.parametrize(
    ("step", "into", "back"),
    [
        pytest.param(_scaled, lambda x: x / x.abs().mean(1, keepdim=True), "scale", id="scale"),
        pytest.param(_shifted, lambda x: x - x[:, -1:], "last", id="last value, in place"),
        pytest.param(_skipped, lambda x: x, "skip", id="global skip"),
        pytest.param(_reversed, lambda x: x / x.abs().mean(1, keepdim=True), "scale", id="reversible, attribute"),
        pytest.param(_reversed, lambda x: x / x.abs().mean(1, keepdim=True), "scale", id="reversible, buffer"),
    ],
)
def test_what_goes_around_without_weights_is_that_of_both_rows(
    make_trainer: MakeTrainer, step: Any, into: Any, back: str, request: pytest.FixtureRequest
) -> None:
    def restored(out: Tensor, x: Tensor) -> Tensor:
        if back == "scale":
            return out * x.abs().mean(1, keepdim=True)
        return out + (x[:, -1:] if back == "last" else x[:, :3])

    def half(net: Net, plan: MixPlan, x: Tensor, r: Tensor) -> Tensor:
        return F.l1_loss(restored(net.mixed(into(X), plan), x)[:, 0], r)

    net = Net(step, reversible=Reversible("buffer" in request.node.callspec.id))
    assert_exact(
        make_trainer,
        net,
        (X, R),
        ["first"],
        lambda net, plan: half(net, plan, X, R),
        lambda net, plan: half(net, plan, X[plan.partner], R[plan.partner]),
    )


def test_features_of_zero_and_one_that_skip_a_layer_are_a_way_around_it() -> None:
    binary = (X > 0).double()

    def step(net: Net, batch: Any) -> Tensor:
        return F.cross_entropy(net.head(torch.cat([net.first(batch[0])[:, :2], batch[0]], dim=1)), batch[1])

    first = mm_lightning.inspect(Net(step), (binary, Y)).layers[1]
    assert (first.name, first.safe) == ("first", False)
    assert first.reason == "a path from the batch to 'head' leads around it"


@pytest.mark.parametrize("kinds", [2, 3])
def test_a_category_that_enters_after_a_layer_is_a_way_around_it(kinds: int) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        encoded = F.one_hot(batch[1].squeeze(1), kinds).double()
        return F.cross_entropy(net.head(torch.cat([net.first(batch[0])[:, kinds:], encoded], dim=1)), batch[2])

    first = mm_lightning.inspect(Net(step), (X, Y[:, None] % kinds, Y)).layers[1]
    assert (first.name, first.safe) == ("first", False)
    assert first.reason == "a path from the batch to 'head' leads around it"


@pytest.mark.parametrize("use", ["one_hot", "number"])
def test_a_category_of_one_dimension_that_enters_after_a_layer_is_not_taken_for_a_mask(use: str) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        x, kind, y = batch
        encoded = F.one_hot(kind, 3).double() if use == "one_hot" else kind[:, None].double().expand(-1, 3)
        return F.cross_entropy(net.head(torch.cat([net.first(x)[:, 3:], encoded], dim=1)), y)

    first = mm_lightning.inspect(Net(step), (X, (Y + torch.arange(8)) % 3, Y)).layers[1]
    assert (first.name, first.safe) == ("first", False)
    assert first.reason == "a path from the batch to 'head' leads around it"


@pytest.mark.parametrize("use", ["scales", "selects"])
def test_lengths_that_scale_or_select_after_a_layer_are_no_way_around_it(use: str) -> None:
    lengths = torch.tensor([1, 2, 3, 3, 2, 1, 2, 3])
    x = X.reshape(8, 1, 6) * torch.arange(1.0, 4.0, dtype=torch.float64)[:, None]  # (N, T, D)

    def step(net: Net, batch: Any) -> Tensor:
        x, lengths, y = batch
        hidden = net.first(x)
        if use == "selects":
            hidden = hidden.masked_fill((torch.arange(3) >= lengths[:, None])[:, :, None], 0.0)
        return F.cross_entropy(net.head(hidden.sum(1) / lengths[:, None]), y)

    assert mm_lightning.inspect(Net(step), (x, lengths, Y)).layers[1].safe


# -------------------------------------------------------------------------------------------------------------- losses


class MeanSquares(Metric):
    """A loss that is a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("n", torch.zeros(()), "sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        self.total += ((predicted - target) ** 2).sum()
        self.n += len(target)

    def compute(self) -> Tensor:
        return self.total / self.n


def _traced() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the newest PyTorch, which would rather compile
        return torch.jit.trace(lambda p, t: ((p - t).abs() * torch.exp(t)).mean(), (R, R + 1))


scripted = _traced()


class ByTarget(torch.autograd.Function):
    """A loss whose gradient looks at the targets in its own way."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(predicted, target)
        return (predicted - target).abs().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        predicted, target = ctx.saved_tensors
        return grad * (predicted - target) * target.exp(), None


def _hooked(predicted: Tensor, target: Tensor) -> Tensor:
    predicted = predicted.view_as(predicted)
    predicted.register_hook(lambda grad: grad * target.exp())
    return F.l1_loss(predicted, target)


def _returns(predicted: Tensor, target: Tensor) -> Tensor:
    """Discounted sums of many steps."""
    sums = torch.zeros_like(target)
    for _ in range(1000):
        sums = target + 0.97 * sums
    return F.smooth_l1_loss(predicted, sums)


def _by_numpy(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - torch.from_numpy(np.exp(target.detach().numpy()))).abs().mean()


def _by_part(predicted: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(predicted, target) * (1 + (target[:4] > 0).double().mean().item())


@pytest.mark.parametrize("layer", ["input", "first"])
@pytest.mark.parametrize(
    "loss",
    [scripted, ByTarget.apply, _hooked, _returns, _by_numpy, lambda p, t: F.l1_loss(p, t.to_sparse().to_dense())],
    ids=["scripted", "autograd function", "hook", "long loop", "numpy", "sparse"],
)
def test_any_loss_is_mixed(make_trainer: MakeTrainer, loss: Any, layer: str) -> None:
    net = Net(lambda net, batch: loss(net(batch[0])[:, 0], batch[1]))
    assert_exact(
        make_trainer,
        net,
        (X, R),
        layer,
        lambda net, plan: loss(net.mixed(X, plan)[:, 0], R),
        lambda net, plan: loss(net.mixed(X, plan)[:, 0], R[plan.partner]),
    )


def test_a_loss_of_a_part_of_the_batch_is_mixed_at_the_input_alone(make_trainer: MakeTrainer) -> None:
    net = Net(lambda net, batch: _by_part(net(batch[0])[:, 0], batch[1]))
    assert_exact(
        make_trainer,
        net,
        (X, R),
        "input",
        lambda net, plan: _by_part(net.mixed(X, plan)[:, 0], R),
        lambda net, plan: _by_part(net.mixed(X, plan)[:, 0], R[plan.partner]),
    )
    assert_refused(make_trainer, net, (X, R), "first", f"{EDGE}.*and so it is for the same batch in another order")


def test_a_hook_on_the_gradient_of_logits_sees_the_targets_of_its_half(make_trainer: MakeTrainer) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        logits.register_hook(lambda grad: grad * (1 + y[:, None]))
        return F.multi_margin_loss(logits, y)

    net = Net(lambda net, batch: loss(net(batch[0]), batch[1]))
    assert_exact(
        make_trainer,
        net,
        (X, Y),
        "first",
        lambda net, plan: loss(net.mixed(X, plan).clone(), Y),
        lambda net, plan: loss(net.mixed(X, plan).clone(), Y[plan.partner]),
    )


@pytest.mark.parametrize("spec", [None, "metric"], ids=["not named", "named"])
def test_a_metric_may_be_the_loss(make_trainer: MakeTrainer, spec: Any) -> None:
    net = Net(lambda net, batch: net.metric(net(batch[0])[:, 0], batch[1]), metric=MeanSquares())
    assert_exact(
        make_trainer,
        net,
        (X, R),
        "first",
        lambda net, plan: F.mse_loss(net.mixed(X, plan)[:, 0], R),
        lambda net, plan: F.mse_loss(net.mixed(X, plan)[:, 0], R[plan.partner]),
        loss=spec,
    )
    assert float(net.metric.n) == 4 * 8  # each batch once


# ------------------------------------------------------------------------------------------------------------- batches


@dataclasses.dataclass
class Validated:
    """Takes tensors alone, and notes what is written into it."""

    image: Tensor
    label: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor")
        WRITTEN.append(name)
        object.__setattr__(self, name, value)


WRITTEN: list[str] = []


@pytest.mark.parametrize(
    ("form", "read"),
    [
        pytest.param(lambda: R.numpy().copy(), torch.as_tensor, id="array"),
        pytest.param(R.tolist, lambda v: torch.tensor(v, dtype=torch.float64), id="list"),
        pytest.param(lambda: SimpleNamespace(of={"it": R}), lambda v: v.of["it"], id="object"),
        pytest.param(
            lambda: [{"it": r} for r in R], lambda v: torch.stack([row["it"] for row in v]), id="list of dicts"
        ),
    ],
)
def test_targets_of_any_form_are_mixed(make_trainer: MakeTrainer, form: Any, read: Any) -> None:
    def loss(net: Net, logits: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return F.cross_entropy(logits, y) + (logits[:, 0] - r).abs().mean()

    net = Net(lambda net, batch: loss(net, net(batch[0]), batch[1], read(batch[2])))
    assert_exact(
        make_trainer,
        net,
        (X, Y, form()),
        "first",
        lambda net, plan: loss(net, net.mixed(X, plan), Y, R),
        lambda net, plan: loss(net, net.mixed(X, plan), Y[plan.partner], R[plan.partner]),
    )


def _cross_entropies(make_trainer: MakeTrainer, step: Any, batch: Any, **settings: Any) -> None:
    assert_exact(
        make_trainer,
        Net(step),
        batch,
        "first",
        lambda net, plan: F.cross_entropy(net.mixed(X, plan), Y),
        lambda net, plan: F.cross_entropy(net.mixed(X, plan), Y[plan.partner]),
        **settings,
    )


def test_a_validated_batch_is_never_written_to(make_trainer: MakeTrainer) -> None:
    def step(net: Net, b: Any) -> Tensor:
        return F.cross_entropy(net(b.image), b.label)

    batch = Validated(X, Y)
    WRITTEN.clear()
    make_trainer().fit(Net(step), Batches([batch] * 4))
    by_lightning = list(WRITTEN)  # which moves a copy to the device
    WRITTEN.clear()
    _cross_entropies(make_trainer, step, batch)
    assert by_lightning == WRITTEN
    assert batch.image is X
    assert batch.label is Y


@pytest.mark.parametrize("lengths", [[3, 5, 1, 4, 2, 6, 7, 9], [1] * 8, [2] * 8, [0, 0, 0, 0, 1, 2, 3, 1]])
def test_boxes_do_not_outvote_images(make_trainer: MakeTrainer, lengths: list[int]) -> None:
    batch = {"image": X, "label": Y, "boxes": [torch.zeros(length, 4) for length in lengths]}
    _cross_entropies(make_trainer, lambda net, b: F.cross_entropy(net(b["image"]), b["label"]), batch)


def test_a_step_may_empty_and_change_its_batch(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        labels = batch.pop("label")
        labels -= 1
        return F.cross_entropy(net(batch["image"]), labels)

    net, batches = Net(step), [{"image": X.clone(), "label": Y + 1} for _ in range(3)]
    for plan, loss in train(make_trainer, net, batches, "first")[0]:
        logits, lam = net.mixed(X, plan), float(plan.lam[0])
        wanted = lam * F.cross_entropy(logits, Y) + (1 - lam) * F.cross_entropy(logits, Y[plan.partner])
        assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("told", [{}, {"batch_size": 4}], ids=["learned", "told"])
def test_a_graph_batch_is_mixed_by_its_graphs_where_these_are_the_rows(make_trainer: MakeTrainer, told: Any) -> None:
    nodes, of = (
        torch.randn(11, 6, generator=GENERATOR, dtype=torch.float64),
        torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]),
    )
    edges, y = torch.stack([torch.arange(11), torch.arange(11).flip(0)]), torch.tensor([0, 1, 2, 1])

    def pooled(net: Net, batch: Any) -> Tensor:
        hidden = torch.tanh(net.first(batch.nodes)).index_add(0, batch.edges[0], net.first(batch.nodes)[batch.edges[1]])
        return torch.zeros(4, 8, dtype=torch.float64).index_add(0, batch.of, hidden)

    def step(net: Net, batch: Any) -> Tensor:
        return F.cross_entropy(net.head(torch.tanh(net.second(pooled(net, batch)))), batch.y)

    batch, net = SimpleNamespace(nodes=nodes, edges=edges, of=of, y=y), Net(step)
    assert_refused(make_trainer, Net(step), batch, "auto", "found no layer")

    def half(net: Net, plan: MixPlan, y: Tensor) -> Tensor:
        return F.cross_entropy(net.head(torch.tanh(mix(net.second(pooled(net, batch)), plan))), y)

    assert_exact(
        make_trainer,
        net,
        batch,
        "second",
        lambda net, plan: half(net, plan, y),
        lambda net, plan: half(net, plan, y[plan.partner]),
        **told,
    )


class Passing(nn.Module):
    """A message to each node from another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return torch.tanh(self.weigh(nodes)).index_add(0, edges[0], nodes[edges[1]])


def test_nodes_are_no_rows_where_targets_are_those_of_graphs(make_trainer: MakeTrainer) -> None:
    """Nodes and their graphs' numbers can move together, with all targets left where they are."""
    nodes, of = torch.randn(11, 6, generator=GENERATOR, dtype=torch.float64), torch.arange(11) % 4
    edges, y = torch.randint(0, 11, (2, 17), generator=GENERATOR), torch.tensor([0.5, -1.0, 2.0, 1.0]).double()

    def step(net: Any, batch: Any) -> Tensor:
        pooled = torch.zeros(4, 6, dtype=torch.float64).index_add(0, batch[2], net.passing(batch[0], batch[1]))
        return F.mse_loss(net.head(torch.tanh(net.second(torch.tanh(net.first(pooled))))).sum(dim=1), batch[3])

    def half(net: Any, plan: MixPlan, y: Tensor) -> Tensor:
        pooled = torch.zeros(4, 6, dtype=torch.float64).index_add(0, of, net.passing(nodes, edges))
        return F.mse_loss(net.mixed(pooled, plan).sum(dim=1), y)

    assert_exact(
        make_trainer,
        Net(step, passing=Passing()),
        (nodes, edges, of, y),
        "auto",
        lambda net, plan: half(net, plan, y),
        lambda net, plan: half(net, plan, y[plan.partner]),
    )


# ------------------------------------------------------------------------------------------ inputs that are targets too


def test_an_autoencoder_is_mixed_at_its_input(make_trainer: MakeTrainer) -> None:
    net = Net(lambda net, batch: F.l1_loss(net(batch[0]), batch[0][:, :3]))
    assert_exact(
        make_trainer,
        net,
        (X,),
        "input",
        lambda net, plan: F.l1_loss(net.mixed(X, plan), X[:, :3]),
        lambda net, plan: F.l1_loss(net.mixed(X, plan), X[plan.partner, :3]),
    )


def test_an_entry_of_several_modules_is_mixed_where_more_follows(make_trainer: MakeTrainer) -> None:
    encoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    net = Net(lambda net, batch: F.l1_loss(net(net.encoder(batch[0])), batch[0][:, :3]), encoder=encoder)
    assert_exact(
        make_trainer,
        net,
        (X,),
        "input",
        lambda net, plan: F.l1_loss(net(net.encoder(mix(X, plan))), X[:, :3]),
        lambda net, plan: F.l1_loss(net(net.encoder(mix(X, plan))), X[plan.partner, :3]),
    )


class WithItsLoss(nn.Module):
    """An autoencoder that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(6, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
        self.decoder = nn.Linear(4, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.encoder(x), x)

    def of(self, hidden: Tensor, x: Tensor) -> Tensor:
        return F.l1_loss(self.decoder(torch.tanh(self.middle(torch.tanh(hidden)))), x)


def test_an_autoencoder_that_computes_its_loss_is_mixed_inside(make_trainer: MakeTrainer) -> None:
    assert_exact(
        make_trainer,
        Net(lambda net, batch: net.model(batch[0]), model=WithItsLoss()),
        (X,),
        "auto",
        lambda net, plan: net.model.of(mix(net.model.encoder(X), plan), X),
        lambda net, plan: net.model.of(mix(net.model.encoder(X), plan), X[plan.partner]),
    )


def test_a_gradient_penalty_is_mixed_at_the_input_alone(make_trainer: MakeTrainer) -> None:
    def loss(net: Net, x: Tensor, y: Tensor, plan: MixPlan | None = None) -> Tensor:
        x = x.clone().requires_grad_()
        cross_entropy = F.cross_entropy(net(x), y)
        return cross_entropy + torch.autograd.grad(cross_entropy, x, create_graph=True)[0].square().sum()

    net = Net(lambda net, batch: loss(net, *batch))
    assert_exact(
        make_trainer,
        net,
        (X, Y),
        "input",
        lambda net, plan: loss(net, mix(X, plan), Y),
        lambda net, plan: loss(net, mix(X, plan), Y[plan.partner]),
    )
    assert_refused(make_trainer, net, (X, Y), "first", f"{EDGE}: mixing there fails with RuntimeError: .*different")


@pytest.mark.parametrize("layer", ["input", "first"])
def test_past_and_future_of_a_series_are_mixed_apart(make_trainer: MakeTrainer, layer: str) -> None:
    series = torch.randn(8, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    net = Net(lambda net, batch: F.l1_loss(net(batch[0][:, :6]), batch[0][:, 6:]))
    assert_exact(
        make_trainer,
        net,
        (series,),
        layer,
        lambda net, plan: F.l1_loss(net.mixed(series[:, :6], plan), series[:, 6:]),
        lambda net, plan: F.l1_loss(net.mixed(series[:, :6], plan), series[plan.partner, 6:]),
    )


class Doubly(nn.Module):
    """A block whose input goes on without what the block has explained, as in N-BEATS."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.fore = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.back(x).tanh(), self.fore(x).tanh()


def test_a_target_that_goes_around_its_entry_into_the_network_is_refused(make_trainer: MakeTrainer) -> None:
    def step(net: Any, batch: Any) -> Tensor:
        series, future = batch
        back, fore = net.block(series)
        rest = series - back
        return F.l1_loss(fore + net.first(rest)[:, :3], future) + rest.abs().mean()

    message = "an input enters the network at 'block', which takes a target too, and on a path around"
    assert_refused(make_trainer, Net(step, block=Doubly()), (X, X[:, :3].cos()), "input", message)


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_target_that_meets_a_vector_of_the_loss_stays_a_target(make_trainer: MakeTrainer, is_trained: bool) -> None:
    def loss(net: Any, hat: Tensor, target: Tensor) -> Tensor:
        error = (target - hat)[:, None, :] * net.levels.weight[None, None, :]
        return torch.maximum(error, -error / 2).mean()

    levels = nn.LayerNorm(3, bias=False, dtype=torch.float64).requires_grad_(is_trained)
    assert_exact(
        make_trainer,
        Net(lambda net, batch: loss(net, net(batch[0]), batch[0][:, :3].cos()), levels=levels),
        (X,),
        ["input", "first"],
        lambda net, plan: loss(net, net.mixed(X, plan), X[:, :3].cos()),
        lambda net, plan: loss(net, net.mixed(X, plan), X[plan.partner, :3].cos()),
        strict=True,
    )


def test_an_input_is_mixed_where_it_enters_after_padding(make_trainer: MakeTrainer) -> None:
    def loss(net: Any, series: Tensor, plan: MixPlan | None = None, partner: Tensor | None = None) -> Tensor:
        past, future = net.pad(series)[:, 3:].split([6, 1], dim=1)
        target = future if partner is None else future[partner]
        return F.l1_loss(net(past if plan is None else mix(past, plan)), target.expand(8, 3))

    assert_exact(
        make_trainer,
        Net(lambda net, batch: loss(net, batch[0]), pad=nn.ZeroPad1d((4, 0))),
        (X,),
        "input",
        lambda net, plan: loss(net, X, plan),
        lambda net, plan: loss(net, X, plan, plan.partner),
    )


class Pair(nn.Module):
    """Two inputs in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.past, self.known = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(2, 8, dtype=torch.float64)

    def forward(self, past: Tensor, known: Tensor) -> Tensor:
        return (self.past(past) + self.known(known)).tanh()


def test_what_enters_together_with_a_target_is_mixed_once(make_trainer: MakeTrainer) -> None:
    def loss(net: Any, past: Tensor, known: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(net.head(net.pair(past, known)), target[:, :3])

    known = X[:, :2].sin()
    assert_exact(
        make_trainer,
        Net(lambda net, batch: loss(net, *batch, batch[0]), pair=Pair()),
        (X, known),
        "input",
        lambda net, plan: loss(net, mix(X, plan), mix(known, plan), X),
        lambda net, plan: loss(net, mix(X, plan), mix(known, plan), X[plan.partner]),
    )


class Items(nn.Module):
    """Looks rows up in a table that a module returns whole, and scores all of it, as recommenders do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, dtype=torch.float64)
        self.mixer = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, ids: Tensor, plan: MixPlan | None = None) -> Tensor:
        table = self.table(torch.arange(9))
        hidden = self.mixer(table[ids])
        hidden = hidden if plan is None else mix(hidden, plan)
        return hidden.tanh().mean(dim=1) @ table.T


def test_a_table_that_a_module_returns_is_one_of_weights(make_trainer: MakeTrainer) -> None:
    ids = torch.randint(0, 9, (8, 5), generator=GENERATOR)
    net = Net(lambda net, batch: F.cross_entropy(net.items(batch[0]), batch[1]), items=Items())
    assert_exact(
        make_trainer,
        net,
        (ids, Y),
        "items.mixer",
        lambda net, plan: F.cross_entropy(net.items(ids, plan), Y),
        lambda net, plan: F.cross_entropy(net.items(ids, plan), Y[plan.partner]),
    )
    message = "'items' embeds something else|enter the network outside of a module such as nn.Embedding"
    assert_refused(make_trainer, net, (ids, Y), "input", message)


class Columns(nn.Module):
    """Categories, embedded, beside numbers as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2, dtype=torch.float64)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return torch.cat([self.table(categories), numbers], dim=1)


def test_numbers_beside_embedded_categories_are_mixed_once(make_trainer: MakeTrainer) -> None:
    def loss(net: Any, plan: MixPlan, y: Tensor) -> Tensor:
        return F.cross_entropy(net(mix(net.columns(Y, X[:, :4]), plan)), y)

    assert_exact(
        make_trainer,
        Net(lambda net, batch: F.cross_entropy(net(net.columns(*batch[:2])), batch[2]), columns=Columns()),
        (Y, X[:, :4], Y),
        "input",
        lambda net, plan: loss(net, plan, Y),
        lambda net, plan: loss(net, plan, Y[plan.partner]),
    )


class ApplyOfC:
    """Binds to a class, and has nothing else that a class method has, as ``Function.apply`` of torch 2.14."""

    def __init__(self, bound: Any) -> None:
        self.bound = bound

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self.bound.__get__(instance, owner)


class Cube(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3 * ctx.saved_tensors[0] ** 2


def test_a_function_of_autograd_is_seen_whatever_applies_it(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.autograd.Function, "apply", ApplyOfC(vars(torch.autograd.Function)["apply"]))
    assert_exact(
        make_trainer,
        Net(lambda net, batch: F.cross_entropy(Cube.apply(net(batch[0])), batch[1])),
        (X, Y),
        "first",
        lambda net, plan: F.cross_entropy(Cube.apply(net.mixed(X, plan)), Y),
        lambda net, plan: F.cross_entropy(Cube.apply(net.mixed(X, plan)), Y[plan.partner]),
    )


class TwoTexts(Net):
    """One table for two texts of a row."""

    def __init__(self) -> None:
        super().__init__(lambda net, batch: F.cross_entropy(net.texts(*batch[:2]), batch[2]))
        self.table = nn.Embedding(9, 3, dtype=torch.float64)

    def texts(self, a: Tensor, b: Tensor, plan: MixPlan | None = None) -> Tensor:
        hidden = [self.table(ids) if plan is None else mix(self.table(ids), plan) for ids in (a, b)]
        return self(torch.cat([h.mean(1) for h in hidden], dim=1))


def test_an_embedding_that_is_called_twice_is_the_input(make_trainer: MakeTrainer) -> None:
    a, b = torch.randint(0, 9, (2, 8, 5), generator=torch.Generator().manual_seed(2))
    assert_exact(
        make_trainer,
        TwoTexts(),
        (a, b, Y),
        "input",
        lambda net, plan: F.cross_entropy(net.texts(a, b, plan), Y),
        lambda net, plan: F.cross_entropy(net.texts(a, b, plan), Y[plan.partner]),
    )


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("layer", ["input", "waves"])
def test_complex_numbers_are_mixed(make_trainer: MakeTrainer, layer: str) -> None:
    x = torch.randn(8, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    net = Net(lambda net, batch: F.cross_entropy(net(net.waves(batch[0]).abs()), batch[1]))
    net.waves = nn.Linear(4, 6, dtype=torch.complex128)

    def half(net: Any, plan: MixPlan, y: Tensor) -> Tensor:
        waves = net.waves(mix(x, plan)) if layer == "input" else mix(net.waves(x), plan)
        return F.cross_entropy(net(waves.abs()), y)

    assert_exact(make_trainer, net, (x, Y), layer, lambda n, p: half(n, p, Y), lambda n, p: half(n, p, Y[p.partner]))


def test_features_of_zero_and_one_are_mixed_as_any(make_trainer: MakeTrainer) -> None:
    binary = (X > 0).double()
    net = Net(lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
    assert_exact(
        make_trainer,
        net,
        (binary, Y),
        "input",
        lambda net, plan: F.cross_entropy(net.mixed(binary, plan), Y),
        lambda net, plan: F.cross_entropy(net.mixed(binary, plan), Y[plan.partner]),
    )


def test_a_step_may_look_at_its_inputs_with_numpy(make_trainer: MakeTrainer) -> None:
    shown = []

    def step(net: Net, batch: Any) -> Tensor:
        shown.append(batch[0].numpy().sum())
        return F.cross_entropy(net(batch[0]), batch[1])

    _cross_entropies(make_trainer, step, (X, Y))
    assert shown[-1] == X.numpy().sum()


def test_prototypes_are_mixed_at_the_input(make_trainer: MakeTrainer) -> None:
    def loss(hidden: Tensor, y: Tensor) -> Tensor:
        (support, query), (of_support, of_query) = hidden.chunk(2), y.chunk(2)
        classes = torch.unique(of_support)
        prototypes = torch.stack([support[of_support == k].mean(0) for k in classes])
        distances = (prototypes[None] - query[:, None]).square().sum(2)
        return F.cross_entropy(-distances, (classes[None] == of_query[:, None]).long().argmax(-1))

    net = Net(lambda net, batch: loss(net(batch[0]), batch[1]))
    assert_refused(make_trainer, net, (X, Y), "second", EDGE)
    assert_exact(
        make_trainer,
        net,
        (X, Y),
        "input",
        lambda net, plan: loss(net.mixed(X, plan), Y),
        lambda net, plan: loss(net.mixed(X, plan), Y[plan.partner]),
    )
