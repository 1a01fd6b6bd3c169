"""Steps that would mix only features or only targets, and what they are told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning import ManifoldMixupCallback, mixed_accuracy

MakeTrainer = Callable[..., pl.Trainer]
Step = Callable[["Net", Any], Any]
X, ZEROS = torch.linspace(-1, 1, 24).view(6, 4), torch.zeros(6, dtype=torch.int64)


class Net(pl.LightningModule):
    """Whose training step a test hands in."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(3, 3)
        self.aside = nn.Linear(4, 8)
        self.pair = _Pair()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Batches(list[Any]):
    """A plain loader of given batches."""


def fit(make_trainer: MakeTrainer, step: Step, layers: Any, batch: Any = None, **settings: Any) -> Net:
    """Train a new network, always the same at first, for 20 steps; without the callback if ``layers`` is None."""
    torch.manual_seed(0)
    net = Net(step)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    batches = Batches([(x, y) if batch is None else batch] * 20)
    callbacks = [] if layers is None else [ManifoldMixupCallback(layers=layers, schedule=None, **settings)]
    make_trainer(*callbacks).fit(net, batches)
    return net


def plain(net: Net, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(net.second(torch.relu(net.first(x))), y)


def test_a_plain_step_passes(make_trainer: MakeTrainer) -> None:
    losses = []

    def step(net: Net, batch: Any) -> Tensor:
        losses.append(plain(net, batch))
        return losses[-1]

    fit(make_trainer, step, ["input", "first"])
    assert len(losses) == 6 + 4 + 20  # the look: as it is, reordered, both halves at two layers; and again at one


def _no_loss(net: Net, batch: Any) -> Tensor:
    return net.second(net.first(batch[0])).square().mean()


def _no_loss_of_a_flat_state(net: Net, batch: Any) -> Tensor:
    hidden = net.first(batch[0])
    return net.second(hidden.view(hidden.size(0), hidden.numel() // len(hidden))).sum()


def _twice(net: Net, batch: Any) -> Tensor:
    net.first(batch[0])
    return plain(net, batch)


def _shared_layer(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.unused(net.unused(net.second(net.first(batch[0])))), batch[1])


def _auxiliary_head(net: Net, batch: Any) -> Tensor:
    hidden = net.first(batch[0])
    auxiliary = hidden[:, :3] * 2
    logits = net.unused(net.second(hidden))
    return F.cross_entropy(logits, batch[1]) + F.cross_entropy(auxiliary, batch[1])


def _residual(net: Net, batch: Any) -> Tensor:
    hidden = net.second(net.first(batch[0]))
    return F.cross_entropy(hidden + net.unused(hidden), batch[1])


def _second_input(net: Net, batch: Any) -> Tensor:
    other = net.second(torch.tanh(net.aside(batch[0] * 2)))
    return F.cross_entropy(net.unused(net.first(batch[0])[:, :3]) + other, batch[1])


def _loss_on_a_derived_input(net: Net, batch: Any) -> Tensor:
    wanted = batch[0] * 2
    hidden = net.first(batch[0])
    return F.cross_entropy(net.second(hidden), batch[1]) + (hidden[:, :4] - wanted).abs().mean()


def _other_targets(net: Net, batch: Any) -> Tensor:
    logits = net.second(net.first(batch[0]))
    return F.cross_entropy(logits, batch[1]) + F.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2]))


def _masked_by_chance(net: Net, batch: Any) -> Tensor:
    logits = net.second(net.first(batch[0]))
    mask = torch.tensor([True, False, True, False, True, False])
    return F.cross_entropy(logits, batch[1]) + F.cross_entropy(logits, batch[1].masked_fill(mask, -100))


def _kept_targets(net: Net, batch: Any) -> Tensor:
    logits = net.second(net.first(batch[0]))
    kept, net.kept = getattr(net, "kept", batch[1]), batch[1]
    return F.cross_entropy(logits, kept) + F.cross_entropy(logits, batch[1])


def _token_bypass(net: Net, batch: Any) -> Tensor:
    aside = F.embedding(batch[1], net.second.weight.T[:4])  # of another integer tensor, in a real module
    return F.cross_entropy(net.second(net.first(batch[0])) + aside, batch[1])


def _early_loss(net: Net, batch: Any) -> Tensor:
    x, y = batch
    hidden = net.first(x)
    return F.cross_entropy(hidden, y) + F.cross_entropy(net.second(hidden), y)


def _reconstruction(net: Net, batch: Any) -> Tensor:
    hidden = net.first(batch[0])
    return F.cross_entropy(net.second(hidden), batch[1]) + F.mse_loss(hidden[:, :4], batch[0])


def _input_again(net: Net, batch: Any) -> Tensor:
    hidden = net.first(batch[0])
    return F.cross_entropy(net.second(torch.cat([hidden[:, :4], batch[0]], dim=1)), batch[1])


def _input_once(net: Net, batch: Any) -> Tensor:
    hidden = net.first(batch[0])
    return F.cross_entropy(net.second(torch.cat([hidden[:, :4], hidden[:, 4:]], dim=1)), batch[1])


def _by_hand(net: Net, batch: Any) -> Tensor:
    log_probs = net.second(net.first(batch[0])).log_softmax(dim=1)
    return -log_probs[torch.arange(6), batch[1]].mean()


def _margin(net: Net, batch: Any) -> Tensor:
    return F.multi_margin_loss(net.second(net.first(batch[0])), batch[1])


def _logits_by_class(net: Net, batch: Any) -> Tensor:
    logits = net.second(net.first(batch[0])).clone()
    logits[torch.arange(6), batch[1]] = 0.0
    return F.cross_entropy(logits, batch[1])


def _one_hot_by_scatter(net: Net, batch: Any) -> Tensor:
    logits = net.second(net.first(batch[0]))
    one_hot = torch.zeros(6, 3).scatter_(1, batch[1][:, None], 1.0)
    return F.cross_entropy(logits, batch[1]) - (one_hot * logits.log_softmax(dim=1)).sum()


def _sorted(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.second(net.first(batch[0])), batch[1].sort().values)


def _shuffled(net: Net, batch: Any) -> Tensor:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    return plain(net, (batch[0][order], batch[1][order]))


def _through_a_pair(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.second(net.pair(net.first(batch[0]))[0]), batch[1])


def _transposed(net: Net, batch: Any) -> Tensor:
    return F.cross_entropy(net.unused(net.second(net.first(batch[0])).T[:, :3]), batch[1][:3])


@pytest.mark.parametrize(
    ("step", "layers", "message"),
    [
        (_no_loss, "first", r"mixed at layer 'first', but no loss on the batch's targets was seen"),
        (_no_loss_of_a_flat_state, "first", r"mixed at layer 'first', but no loss on the batch's targets was seen"),
        (_twice, "first", "Layer 'first' cannot be mixed: runs 2 times in training_step"),
        (_auxiliary_head, "second", "Layer 'second' cannot be mixed: a path from 'first' to the loss leads around it"),
        (_residual, "unused", "Layer 'unused' cannot be mixed: a path from 'second' to the loss leads around it"),
        (_second_input, "first", "a path from the batch to the loss through 'aside' leads around it"),
        (_other_targets, "first", "the loss is .* and so it is for the same batch in another order"),
        (_masked_by_chance, "first", "the loss is .* and so it is for the same batch in another order"),
        (_sorted, "first", "with its rows and the targets' in another order, the loss is"),
        (_kept_targets, "first", "with its rows and the targets' in another order, the loss is"),
        (_shared_layer, "unused", "Layer 'unused' cannot be mixed: runs 2 times in training_step"),
        (plain, "unused", "Layer 'unused' cannot be mixed: does not run in training_step"),
        (plain, ["first", "unused"], "Layer 'unused' cannot be mixed: does not run in training_step"),
        (_early_loss, "second", "a path from 'first' to the loss leads around it"),
        (_input_again, "first", "Layer 'first' cannot be mixed: a path from the batch to 'second' leads around it"),
        (_transposed, "unused", r"no floating point output with the 6 rows in dimension 0: \(3, 3\)"),
        (_shuffled, "first", "Layer 'first' cannot be mixed: its rows are not the batch's"),
    ],
)
def test_half_mixed_steps_are_refused(make_trainer: MakeTrainer, step: Step, layers: Any, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        fit(make_trainer, step, layers, strict=True)


@pytest.mark.parametrize("step", [_residual, _second_input, _input_again], ids=["residual", "second-input", "again"])
def test_a_layer_with_a_way_around_it_is_mixed_with_a_warning(make_trainer: MakeTrainer, step: Step) -> None:
    layers = "unused" if step is _residual else "first"
    with pytest.warns(UserWarning, match=f"Layer '{layers}' is mixed, but a path from .* leads around it"):
        fit(make_trainer, step, layers)


def test_a_loss_beside_the_mixed_layer_is_that_of_unmixed_features_for_both(make_trainer: MakeTrainer) -> None:
    net, callback = Net(_auxiliary_head), ManifoldMixupCallback(layers="second", alpha=1.0, seed=4)
    losses = _watch(net, callback)
    x, y = X + X[:, :1] * X[:, 1:2], torch.tensor([0, 1, 2, 1, 2, 0])
    with pytest.warns(UserWarning, match="Layer 'second' is mixed, but a path from 'first' to the loss leads around"):
        make_trainer(callback).fit(net, Batches([(x, y)] * 3))
    for loss, plan in losses:
        lam, p, hidden = float(plan.lam[0]), plan.partner, net.first(x)
        second = net.second(hidden)
        logits = net.unused(lam * second + (1 - lam) * second[p])
        own = F.cross_entropy(logits, y) + F.cross_entropy(hidden[:, :3] * 2, y)
        partners = F.cross_entropy(logits, y[p]) + F.cross_entropy(hidden[p, :3] * 2, y[p])
        torch.testing.assert_close(loss, (lam * own + (1 - lam) * partners).detach())


@pytest.mark.parametrize(
    "take_out",
    [
        pytest.param(lambda y: torch.autograd.Variable(y), id="Variable"),
        pytest.param(
            lambda y: y.as_subclass(Tensor),
            id="as_subclass",
            marks=pytest.mark.skipif(torch.__version__ < "2.6", reason="of torch 2.6: below, no mode may be on"),
        ),
        pytest.param(lambda y: torch.LongTensor(y), id="LongTensor"),
        pytest.param(lambda y: torch.from_dlpack(y), id="dlpack"),
        pytest.param(lambda y: torch.empty(0, dtype=torch.int64).set_(y), id="set_"),
        pytest.param(lambda y: torch.as_tensor(y.numpy()), id="numpy"),
        pytest.param(lambda y: torch.tensor(y.tolist()), id="list"),
        pytest.param(lambda y: torch.tensor([int(c) for c in y]), id="numbers"),
        pytest.param(lambda y: torch.vmap(lambda row: row + 0)(y), id="vmap"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_targets_taken_out_of_sight_are_mixed_exactly(make_trainer: MakeTrainer, take_out: Any, when: str) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        x, y = batch
        taken = take_out(y) if when == "before" else None
        log_probs = net.second(net.first(x)).log_softmax(dim=1)
        taken = take_out(y) if taken is None else taken
        return F.nll_loss(log_probs, y) - log_probs.gather(1, taken[:, None]).mean().square()

    _assert_exact(make_trainer, step, "first")


def _one_hot_view(net: Net, batch: Any) -> Tensor:
    one_hot = torch.zeros(6, 3)
    flat = one_hot.view(-1)
    one_hot.scatter_(1, batch[1][:, None], 1.0)
    logits = net.second(net.first(batch[0]))
    return (flat * logits.view(-1)).sum() + F.cross_entropy(logits, batch[1])


def _centres_beforehand(net: Net, batch: Any) -> Tensor:
    centres = net.second.weight[batch[1]]
    hidden = net.first(batch[0])
    return F.cross_entropy(net.second(hidden), batch[1]) + (hidden - centres).square().mean()


def _watch(net: Net, callback: ManifoldMixupCallback) -> list[Any]:
    """The loss and the plan of every batch of a network that stays where it is."""
    losses: list[Any] = []
    net.on_train_batch_end = lambda outputs, *_: losses.append((outputs["loss"], callback.plan))  # type: ignore
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore
    return losses


def _assert_exact(make_trainer: MakeTrainer, step: Step, layer: str) -> None:
    net, callback = Net(step), ManifoldMixupCallback(layers=layer, alpha=1.0, seed=4)
    losses = _watch(net, callback)
    x, y = X + X[:, :1] * X[:, 1:2], torch.tensor([0, 1, 2, 1, 2, 0])
    make_trainer(callback).fit(net, Batches([(x, y)] * 3))
    assert len(losses) == 3
    for loss, plan in losses:
        torch.testing.assert_close(loss, _reference(net, step, layer, x, y, plan), rtol=1e-5, atol=1e-6)


def test_a_tensor_that_becomes_a_target_later_is_mixed(make_trainer: MakeTrainer) -> None:
    x, y, z = X + X[:, :1] * X[:, 1:2], torch.tensor([0, 1, 2, 1, 2, 0]), torch.tensor([2, 2, 0, 1, 0, 1])

    def step(net: Net, batch: Any) -> Tensor:
        x, y, z = batch
        log_probs = net.second(net.first(x)).log_softmax(dim=1)
        loss = F.nll_loss(log_probs, y)
        return loss - log_probs.gather(1, z[:, None]).mean() if net.current_epoch > 0 else loss

    net, callback = Net(step), ManifoldMixupCallback(layers="first", alpha=1.0)
    losses = []
    net.on_train_batch_end = lambda outputs, *_: losses.append((outputs["loss"], callback.plan))  # type: ignore
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore
    make_trainer(callback, max_epochs=2).fit(net, Batches([(x, y, z)] * 3))
    for loss, plan in losses[3:]:
        lam, partner, hidden = float(plan.lam[0]), plan.partner, net.first(x)
        log_probs = net.second(lam * hidden + (1 - lam) * hidden[partner]).log_softmax(dim=1)
        parts = [F.nll_loss(log_probs, y[i]) - log_probs.gather(1, z[i, None]).mean() for i in (range(6), partner)]
        torch.testing.assert_close(loss, (lam * parts[0] + (1 - lam) * parts[1]).detach())


EXACT = [
    *(plain, _loss_on_a_derived_input, _reconstruction, _by_hand, _margin, _token_bypass, _one_hot_view),
    *(_centres_beforehand, _logits_by_class, _one_hot_by_scatter, _through_a_pair),
]


@pytest.mark.parametrize("step", EXACT)
def test_any_loss_on_the_batch_is_mixed_exactly(make_trainer: MakeTrainer, step: Step) -> None:
    _assert_exact(make_trainer, step, "pair" if step is _through_a_pair else "first")


def _reference(net: Net, step: Step, layer: str, x: Tensor, y: Tensor, plan: Any) -> Tensor:
    """The step on the mixed hidden state, once with each half of what the loss compares with."""
    lam, partner = float(plan.lam[0]), plan.partner

    def mix(module: nn.Module, args: Any, output: Any) -> Any:
        tensors = [lam * h + (1 - lam) * h[partner] for h in ([output] if isinstance(output, Tensor) else output)]
        return tensors[0] if isinstance(output, Tensor) else tuple(tensors)

    def exchange(module: nn.Module, args: Any, output: Any) -> Any:
        # Of the batch of partners, mixed the other way round: the same hidden state, row by row.
        inverse = torch.argsort(partner)
        tensors = [lam * h[inverse] + (1 - lam) * h for h in ([output] if isinstance(output, Tensor) else output)]
        return tensors[0] if isinstance(output, Tensor) else tuple(tensors)

    losses = []
    for hook, batch in ((mix, (x, y)), (exchange, (x[partner], y[partner]))):
        handle = net.get_submodule(layer).register_forward_hook(hook)
        losses.append(step(net, batch).detach())
        handle.remove()
    return lam * losses[0] + (1 - lam) * losses[1]


@pytest.mark.parametrize("off", [{"alpha": 0}, {"probability": 0.0}], ids=["alpha", "probability"])
def test_without_mixing_the_same_steps_train_as_without_the_callback(
    make_trainer: MakeTrainer, off: dict[str, Any]
) -> None:
    for step in (_no_loss, _twice, _early_loss_of_three, _reconstruction, _by_hand, _margin, _sorted):
        wanted, got = fit(make_trainer, step, None), fit(make_trainer, step, "first", **off)
        assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), got.parameters(), strict=True))


def _early_loss_of_three(net: Net, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(net.first(x)[:, :3], y) + plain(net, batch)


@pytest.mark.parametrize(
    ("batch", "layers", "message"),
    [
        (("a", "b"), "first", "needs tensors in the batch"),
    ],
    ids=["no-tensors"],
)
def test_unmixable_batches_are_refused(make_trainer: MakeTrainer, batch: Any, layers: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fit(make_trainer, plain, layers, batch)


def test_token_indices_may_be_the_input(make_trainer: MakeTrainer) -> None:
    tokens, y = torch.randint(0, 5, (6, 7)), torch.randint(0, 3, (6,))
    table = nn.Embedding(5, 4)

    embedded: list[list[list[int]]] = []

    def step(net: Net, batch: Any) -> Tensor:
        embedded.append(batch[0].tolist())
        return F.cross_entropy(net.second(net.first(table(batch[0])).mean(dim=1)), batch[1])

    fit(make_trainer, step, "first", (tokens, y))
    assert embedded[-18:] == [tokens.tolist()] * 18  # after the look, which reorders them


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_skipped_batch_is_no_error(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor | None:
        return None if batch[0][0, 0] == 0 else plain(net, batch)

    callback = ManifoldMixupCallback(layers=["input", "first"], seed=0, schedule=None)
    batches = [(torch.zeros(6, 4), ZEROS), (X, ZEROS)] * 5
    make_trainer(callback).fit(Net(step), Batches(batches))
    assert callback.summary()["unmixed"] == 0
    assert sum(callback.summary().values()) == 9  # the first could not be looked at


def test_a_step_that_trains_after_all_is_refused(make_trainer: MakeTrainer) -> None:
    calls = []

    def step(net: Net, batch: Any) -> Tensor | None:
        calls.append(1)
        return None if len(calls) == 1 else plain(net, batch)

    with pytest.raises(RuntimeError, match="returned no loss when it was looked at, but does now"):
        fit(make_trainer, step, ["input", "first"])


@pytest.mark.parametrize("form", ["dict", "dataclass", "namedtuple", "nested"])
def test_batches_keep_their_form(make_trainer: MakeTrainer, form: str) -> None:
    import collections
    import dataclasses

    @dataclasses.dataclass
    class Data:
        x: Tensor
        y: Tensor

    named = collections.namedtuple("named", ["x", "y"])
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    forms = {"dict": {"x": x, "y": y}, "dataclass": Data(x, y), "namedtuple": named(x, y), "nested": [{"x": x}, (y,)]}
    batch = forms[form]
    accuracies = []

    def step(net: Net, batch: Any) -> Tensor:
        if form == "nested":
            x, y = batch[0]["x"], batch[1][0]
        else:
            x, y = (batch["x"], batch["y"]) if form == "dict" else (batch.x, batch.y)
        logits = net.second(torch.relu(net.first(x)))
        accuracies.append(mixed_accuracy(logits, y))
        return F.cross_entropy(logits, y)

    fit(make_trainer, step, ["input", "first"], batch)
    assert len(accuracies) == 6 + 4 + 20  # the look: as it is, reordered, both halves at two layers; and again at one


def test_a_second_callback_is_refused(make_trainer: MakeTrainer) -> None:
    class Other(ManifoldMixupCallback):  # of one class, Lightning refuses two by itself
        pass

    trainer = make_trainer(ManifoldMixupCallback(layers="first"), Other(layers="second"))
    with pytest.raises(ValueError, match="has 2 ManifoldMixupCallbacks"):
        trainer.fit(Net(plain), Batches([(X, ZEROS)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        ({"alpha": float("nan")}, "alpha must be a finite number >= 0, got nan"),
        ({"probability": 1.5}, r"probability must be a number in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManifoldMixupCallback(**settings)


def test_an_unknown_layer_names_the_nearest(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"Layer 'frist' is not in Net\. Nearest names: 'first'"):
        fit(make_trainer, plain, "frist")


@pytest.mark.parametrize("step", [_no_loss, _other_targets], ids=["no-loss", "other-targets"])
def test_manual_optimization_is_held_to_the_same(make_trainer: MakeTrainer, step: Step) -> None:
    def manual(net: Net, batch: Any) -> None:
        net.manual_backward(step(net, batch))
        net.optimizers().step()

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(manual)
            self.automatic_optimization = False

    with pytest.raises(RuntimeError, match="mix"):
        make_trainer(ManifoldMixupCallback(layers="first")).fit(Manual(), Batches([(X, ZEROS)] * 3))


def test_a_loss_that_is_differentiated_out_of_sight_is_warned_of(make_trainer: MakeTrainer) -> None:
    def manual(net: Net, batch: Any) -> None:
        weights = list(net.second.parameters())
        for weight, grad in zip(weights, torch.autograd.grad(plain(net, batch), weights), strict=True):
            weight.grad = grad
        net.optimizers().step()

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(manual)
            self.automatic_optimization = False

    with pytest.warns(UserWarning, match="No loss was seen in training_step, so such batches train unmixed"):
        make_trainer(ManifoldMixupCallback(layers="first")).fit(Manual(), Batches([(X, ZEROS)] * 3))


def test_a_bypass_that_begins_later_is_found_in_the_next_epoch(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        return _input_again(net, batch) if net.current_epoch > 0 else _input_once(net, batch)

    # A layer is proved again at the beginning of an epoch, but no more than once in a hundred steps.
    trainer = make_trainer(ManifoldMixupCallback(layers="first"), max_epochs=3)
    with pytest.raises(RuntimeError, match="Layer 'first' cannot be mixed any more: a path from the batch to 'second'"):
        trainer.fit(Net(step), Batches([(X, torch.tensor([0, 1, 2, 1, 2, 0]))] * 101))
    assert trainer.current_epoch == 1


def test_a_layer_that_runs_twice_from_some_epoch_on_is_refused_there(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        hidden = net.unused(net.second(net.first(batch[0])))
        return F.cross_entropy(net.unused(hidden) if net.current_epoch > 0 else hidden, batch[1])

    trainer = make_trainer(ManifoldMixupCallback(layers="unused"), max_epochs=2)
    with pytest.raises(RuntimeError, match="Layer 'unused' ran 2 times in one training_step"):
        trainer.fit(Net(step), Batches([(X, torch.tensor([0, 1, 2, 1, 2, 0]))] * 3))
    assert trainer.current_epoch == 1


def test_small_labels_and_masks_are_paired_beside_a_floating_point_input(make_trainer: MakeTrainer) -> None:
    batch = (X, torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.uint8), torch.tensor([True, False] * 3))

    def step(net: Net, batch: Any) -> Tensor:
        x, y, ignored = batch
        return F.cross_entropy(net.second(net.first(x)), y.long().masked_fill(ignored, -100))

    net, callback = Net(step), ManifoldMixupCallback(layers="first", alpha=1.0)
    losses = []
    net.on_train_batch_end = lambda outputs, *_: losses.append((outputs["loss"], callback.plan))  # type: ignore
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore
    make_trainer(callback).fit(net, Batches([batch] * 2))
    targets = torch.tensor([-100, 1, -100, 2, -100, 0])
    for loss, plan in losses:
        lam, hidden = float(plan.lam[0]), net.first(X)
        logits = net.second(lam * hidden + (1 - lam) * hidden[plan.partner])
        wanted = lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[plan.partner])
        torch.testing.assert_close(loss, wanted.detach())


@pytest.mark.parametrize("layer", ["input", "first"])
def test_images_of_uint8_are_the_input_and_mixed_after_the_first_weights(make_trainer: MakeTrainer, layer: str) -> None:
    images = torch.arange(24, dtype=torch.uint8).view(6, 4)

    def step(net: Net, batch: Any) -> Tensor:
        assert batch[0].dtype == torch.uint8
        return F.cross_entropy(net.second(net.first(batch[0].float() / 255)), batch[1])

    net, callback = Net(step), ManifoldMixupCallback(layers=layer, alpha=1.0)
    losses = []
    net.on_train_batch_end = lambda outputs, *_: losses.append((outputs["loss"], callback.plan))  # type: ignore
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.0)  # type: ignore
    y = torch.tensor([0, 1, 2, 1, 2, 0])
    make_trainer(callback).fit(net, Batches([(images, y)] * 3))
    for loss, plan in losses:
        lam, floats = float(plan.lam[0]), images.float() / 255
        # An affine layer after the mixed image is the mixed affine layer.
        logits = net.second(net.first(lam * floats + (1 - lam) * floats[plan.partner]))
        wanted = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[plan.partner])
        torch.testing.assert_close(loss, wanted.detach())


def test_pairs_die_with_their_step(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        net.kept = batch[1]
        return plain(net, batch)

    net = Net(step)
    make_trainer(ManifoldMixupCallback(layers="first")).fit(net, Batches([(X, ZEROS)] * 2))
    logits = net.second(net.first(X))
    torch.testing.assert_close(F.cross_entropy(logits, net.kept), F.cross_entropy(logits, ZEROS))
    assert type(net.kept + 1) is Tensor


def test_a_stray_tensor_does_not_set_the_batch_size(make_trainer: MakeTrainer) -> None:
    callback = ManifoldMixupCallback(layers="first")
    batch = {"epoch": torch.tensor([3]), "x": X, "y": ZEROS}
    net = Net(lambda net, batch: plain(net, (batch["x"], batch["y"])))
    make_trainer(callback).fit(net, Batches([batch] * 2))
    assert callback.plan is not None
    assert callback.plan.batch_size == 6


def test_frozen_and_reentrant_parts_are_no_bypass(make_trainer: MakeTrainer) -> None:
    from torch.utils.checkpoint import checkpoint

    def frozen(net: Net, batch: Any) -> Tensor:
        with torch.no_grad():
            features = net.aside(batch[0])
        return F.cross_entropy(net.second(features + net.pair(features)[0]), batch[1])

    def reentrant(net: Net, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        return F.cross_entropy(net.second(checkpoint(net.first, x, use_reentrant=True)), batch[1])

    fit(make_trainer, reentrant, "first")
    fit(make_trainer, lambda net, batch: plain(net, batch), "first")
    with pytest.raises(ValueError, match=r"Layer 'first' cannot be mixed: does not run"):
        fit(make_trainer, frozen, "first")


def test_a_copy_made_during_fit_is_never_mixed(make_trainer: MakeTrainer) -> None:
    class Copying(Net):
        def on_fit_start(self) -> None:
            self.teacher = copy.deepcopy(self.first)

    def step(net: Net, batch: Any) -> Tensor:
        with torch.no_grad():
            assert torch.equal(net.teacher(X), F.linear(X, net.teacher.weight, net.teacher.bias))
        return plain(net, batch)

    make_trainer(ManifoldMixupCallback(layers="first")).fit(Copying(step), Batches([(X, ZEROS)] * 3))
