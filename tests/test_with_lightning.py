"""ManifoldMixupCallback beside everything else that a Trainer does, against the same run by hand or without it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import (
    LR,
    Classifier,
    Network,
    Plans,
    assert_no_trace,
    assert_same_weights,
    batches,
    loader,
    mixed_loss,
    mixup,
    rows,
    train_by_hand,
    weights_of,
)
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from versions import WeightAveraging, averages, finds, resumes

MakeTrainer = Callable[..., pl.Trainer]


class Averaging(StochasticWeightAveraging):
    """Shows its averaged copy."""

    @property
    def copy(self) -> nn.Module:
        assert self._average_model is not None
        return self._average_model


class RunningAverage(WeightAveraging):
    """Shows its averaged copy."""

    @property
    def copy(self) -> nn.Module:
        assert self._average_model is not None
        return self._average_model


class Data(pl.LightningDataModule):
    """The rows of :func:`rows`, with a batch size that a tuner can set."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batch_size=self.batch_size)


class Resumable:
    """A loader that Lightning can resume in mid-epoch."""

    def __init__(self) -> None:
        self.index = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.index % 5, 5):  # Lightning does not come back after the last
            self.index = index + 1
            yield batches()[index]

    def state_dict(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.index = state["index"]


class Call(pl.Callback):
    """Calls ``function(trainer, module)`` once, in a hook of the given name."""

    def __init__(self, hook: str, function: Callable[[pl.Trainer, pl.LightningModule], object]) -> None:
        self.function, self.result = function, None
        setattr(self, hook, self.call)

    def call(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if self.result is None:
            self.result = self.function(trainer, module)


class Validated(Classifier):
    """Keeps the validation losses, each checked against a network that nothing is attached to."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        plain = Network()
        plain.load_state_dict(self.state_dict())
        assert torch.equal(loss, F.cross_entropy(plain(x), y))
        self.validated.append(loss)
        return loss


def fit(make_trainer: MakeTrainer, model: pl.LightningModule, data: Any = None, **settings: Any) -> Plans:
    """Train with the callback and return the plans that it drew."""
    callback = mixup()
    plans = Plans(callback)
    make_trainer(callback, plans, **settings).fit(model, loader() if data is None else data)
    return plans


# How gradients become steps.


def test_accumulated_gradients_are_those_of_micro_batches_with_plans_of_their_own(make_trainer: MakeTrainer) -> None:
    model = Classifier()
    plans = fit(make_trainer, model, accumulate_grad_batches=2, max_epochs=2).plans
    assert all(float(one.lam[0]) != float(two.lam[0]) for one, two in pairwise(plans))

    net = Network()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for index, (plan, (x, y)) in enumerate(zip(plans, 2 * batches(), strict=True)):
        (mixed_loss(net, x, y, plan) / 2).backward()
        if index % 5 in (1, 3, 4):  # five batches an epoch: the last step is of one
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, net)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_after_mixing(make_trainer: MakeTrainer, algorithm: str) -> None:
    model = Classifier()
    plans = fit(make_trainer, model, gradient_clip_val=0.02, gradient_clip_algorithm=algorithm, max_epochs=4).plans

    net = Network()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for plan, (x, y) in zip(plans, 4 * batches(), strict=True):
        optimizer.zero_grad()
        mixed_loss(net, x, y, plan).backward()
        if algorithm == "norm":
            assert nn.utils.clip_grad_norm_(net.parameters(), 0.02) > 0.02
        else:
            nn.utils.clip_grad_value_(net.parameters(), 0.02)
        optimizer.step()
    assert_same_weights(model, net)


def test_every_evaluation_of_a_closure_repeats_the_plan(make_trainer: MakeTrainer) -> None:
    class WithLBFGS(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=LR, max_iter=3)

    model = WithLBFGS()
    plans = fit(make_trainer, model, max_epochs=2).plans
    assert len(model.losses) == 30  # three evaluations for each of ten batches

    net = Network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=LR, max_iter=3)
    for plan, (x, y) in zip(plans, 2 * batches(), strict=True):

        def closure(x: Tensor = x, y: Tensor = y, plan: Any = plan) -> Tensor:
            optimizer.zero_grad()
            loss = mixed_loss(net, x, y, plan)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_weights(model, net, atol=1e-10)


def test_several_optimizers_take_turns(make_trainer: MakeTrainer) -> None:
    class TwoOptimizers(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            self.toggle_optimizer(optimizer)
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return _body_and_head(self)

    model = TwoOptimizers()
    plans = fit(make_trainer, model, max_epochs=2).plans

    net = Network()
    optimizers = _body_and_head(net)
    for index, (plan, (x, y)) in enumerate(zip(plans, 2 * batches(), strict=True)):
        net.zero_grad()
        mixed_loss(net, x, y, plan).backward()
        optimizers[index % 5 % 2].step()
    assert_same_weights(model, net)


def test_two_losses_of_one_forward_pass_go_to_two_optimizers(make_trainer: MakeTrainer) -> None:
    class TwoLosses(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            (x, y), optimizers = batch, self.optimizers()
            logits = self(x)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(logits, y), retain_graph=True)
            self.manual_backward(F.cross_entropy(logits, y, label_smoothing=0.3))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return _body_and_head(self)

    model = TwoLosses()
    plans = fit(make_trainer, model).plans

    net = Network()
    for plan, (x, y) in zip(plans, batches(), strict=True):
        net.zero_grad()
        (mixed_loss(net, x, y, plan) + mixed_loss(net, x, y, plan, label_smoothing=0.3)).backward()
        for optimizer in _body_and_head(net):
            optimizer.step()
    assert_same_weights(model, net)


def _body_and_head(net: Network) -> list[torch.optim.Optimizer]:
    body = [*net.first.parameters(), *net.second.parameters()]
    return [torch.optim.SGD(body, lr=LR), torch.optim.SGD(net.head.parameters(), lr=LR / 2)]


# Averages of weights.


@pytest.mark.parametrize("ours_first", [True, False], ids=["before", "after"])
def test_stochastic_weight_averaging_averages_what_a_hand_loop_does(
    make_trainer: MakeTrainer, ours_first: bool
) -> None:
    callback, averaging = mixup(), Averaging(swa_lrs=LR, swa_epoch_start=2)  # from the second epoch, of four
    plans, model = Plans(callback), Validated()
    order = [callback, averaging] if ours_first else [averaging, callback]
    make_trainer(*order, plans, max_epochs=4).fit(model, loader(), loader())

    after_steps: list[list[Tensor]] = []
    train_by_hand(plans.plans, 4 * batches(), lambda net: after_steps.append(weights_of(net)))
    _assert_mean(model, [after_steps[step - 1] for step in (5, 10, 15)])  # it takes them when an epoch starts
    _assert_without_hooks(averaging.copy)
    assert_no_trace(model)


@averages
@pytest.mark.parametrize("ours_first", [True, False], ids=["before", "after"])
def test_weight_averaging_averages_what_a_hand_loop_does(make_trainer: MakeTrainer, ours_first: bool) -> None:
    callback, averaging = mixup(), RunningAverage()
    plans, model = Plans(callback), Validated()
    order = [callback, averaging] if ours_first else [averaging, callback]
    make_trainer(*order, plans, max_epochs=2, num_sanity_val_steps=0).fit(model, loader(), loader())

    after_steps: list[list[Tensor]] = []
    train_by_hand(plans.plans, 2 * batches(), lambda net: after_steps.append(weights_of(net)))
    _assert_mean(model, after_steps)
    _assert_without_hooks(averaging.copy)
    assert_no_trace(model)

    wanted = []  # validation is of the averaged weights, unmixed
    for epoch in (1, 2):
        average = Network()
        for parameter, *values in zip(average.parameters(), *after_steps[: 5 * epoch], strict=True):
            parameter.data = torch.stack(values).mean(dim=0)
        wanted += [F.cross_entropy(average(x), y).detach() for x, y in batches()]
    assert_close(model.validated, wanted, rtol=0, atol=1e-12)


def _assert_mean(model: nn.Module, weights: list[list[Tensor]]) -> None:
    for got, *values in zip(weights_of(model), *weights, strict=True):
        assert_close(got, torch.stack(values).mean(dim=0), rtol=0, atol=1e-12)


def _assert_without_hooks(module: nn.Module) -> None:
    assert not any(part._forward_hooks for part in module.modules())


# The tuner.


def test_the_learning_rate_finder_measures_as_without_the_callback_and_leaves_nothing(
    make_trainer: MakeTrainer,
) -> None:
    def find(model: Classifier, *callbacks: pl.Callback) -> tuple[Any, pl.Trainer]:
        trainer = make_trainer(*callbacks, max_epochs=2)
        finder = Tuner(trainer).lr_find(model, loader(400), num_training=20, min_lr=1e-3, update_attr=False)
        return finder, trainer

    plain, tuned, straight = Classifier(), Classifier(), Classifier()
    callback = mixup()
    plans = Plans(callback)
    wanted, _ = find(plain)
    got, trainer = find(tuned, callback, plans)
    assert got.results == wanted.results
    assert got.suggestion() == wanted.suggestion() is not None
    assert plans.plans == []  # the tuner puts the trainer's callbacks aside
    assert_close(weights_of(tuned), weights_of(Network()), rtol=0, atol=0)
    assert_no_trace(tuned)

    trainer.fit(tuned, loader())
    fit(make_trainer, straight, max_epochs=2)
    assert_same_weights(tuned, straight, atol=0)


@finds
@pytest.mark.parametrize("epoch", [0, 1], ids=["before the first epoch", "in mid-fit"])
def test_a_finder_callback_measures_unmixed_and_fit_goes_on_as_without_it(
    make_trainer: MakeTrainer, epoch: int
) -> None:
    class Find(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.global_step == 5 * epoch and getattr(self, "optimal_lr", None) is None:
                plain, steps = Network(), len(module.losses)
                plain.load_state_dict(module.state_dict())
                self.lr_find(trainer, module)
                first = F.cross_entropy(plain(batches()[0][0]), batches()[0][1])
                assert torch.equal(module.losses[steps], first)
                del module.losses[steps:]

    callback = mixup()
    plans, model = Plans(callback), Classifier()
    find = Find(num_training_steps=4, min_lr=1e-3, update_attr=False)
    make_trainer(find, callback, plans, max_epochs=3).fit(model, loader())
    assert find.optimal_lr is not None
    assert len(model.losses) == 3 * 5
    assert_same_weights(model, train_by_hand(plans.plans, 3 * batches()))


def test_the_batch_size_scaler_finds_as_without_the_callback_and_leaves_nothing(make_trainer: MakeTrainer) -> None:
    def scale(model: Classifier, *callbacks: pl.Callback) -> tuple[int | None, pl.Trainer, Data]:
        trainer, data = make_trainer(*callbacks, max_epochs=2), Data(batch_size=2)
        found = Tuner(trainer).scale_batch_size(model, datamodule=data, init_val=2, max_trials=2, steps_per_trial=1)
        return found, trainer, data

    tuned, straight = Classifier(), Classifier()
    found, trainer, data = scale(tuned, mixup())
    plainly, _, plain_data = scale(Classifier())
    assert found == plainly == data.batch_size == plain_data.batch_size > 2
    assert_close(weights_of(tuned), weights_of(Network()), rtol=0, atol=0)
    assert_no_trace(tuned)

    trainer.fit(tuned, datamodule=data)
    fit(make_trainer, straight, loader(batch_size=data.batch_size), max_epochs=2)
    assert_same_weights(tuned, straight, atol=0)


# Which batches are trained on.


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        pytest.param({"overfit_batches": 2, "max_epochs": 3}, [0, 1] * 3, id="overfit_batches"),
        pytest.param({"fast_dev_run": True}, [0], id="fast_dev_run"),
        pytest.param({"fast_dev_run": 3}, [0, 1, 2], id="fast_dev_run of three"),
        pytest.param({"limit_train_batches": 3, "max_epochs": 2}, [0, 1, 2] * 2, id="limit_train_batches"),
        pytest.param({"max_steps": 7, "max_epochs": 4}, [0, 1, 2, 3, 4, 0, 1], id="max_steps"),
    ],
)
def test_a_part_of_the_batches_is_trained_on_as_by_hand(
    make_trainer: MakeTrainer, settings: dict[str, Any], steps: list[int]
) -> None:
    model = Classifier()
    plans = fit(make_trainer, model, **settings).plans
    assert len({float(plan.lam[0]) for plan in plans}) == len(steps)  # the same batch, another plan
    wanted = train_by_hand(plans, [batches()[step] for step in steps])
    assert_close(weights_of(model), weights_of(wanted), rtol=0, atol=1e-12)


def test_the_rest_of_an_epoch_can_be_skipped(make_trainer: MakeTrainer) -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self) -> None:
            x, y = batches()[0]
            plain = Network()
            plain.load_state_dict(self.state_dict())
            # no batch is trained on now, so this is not mixed
            assert torch.equal(self.training_step((x, y), 0), F.cross_entropy(plain(x), y))

    model = Skipping()
    plans = fit(make_trainer, model, max_epochs=2).plans
    assert_same_weights(model, train_by_hand(plans, 2 * batches()[:2]))


def test_a_data_module_trains_as_a_loader(make_trainer: MakeTrainer) -> None:
    by_module, by_loader = Classifier(), Classifier()
    fit(make_trainer, by_module, Data(), max_epochs=2)
    fit(make_trainer, by_loader, loader(), max_epochs=2)
    assert_same_weights(by_module, by_loader, atol=0)


@pytest.mark.parametrize("form", ["dict", "list", "combined", "max_size_cycle"])
def test_one_of_several_loaders_is_trained_on_as_by_hand(make_trainer: MakeTrainer, form: str) -> None:
    class OfTwo(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labelled, (other,) = batch if form == "list" else (batch["labelled"], batch["other"])
            self.rows = len(other)
            return super().training_step(labelled, batch_idx)

    other = DataLoader(TensorDataset(torch.zeros(12, 4)), batch_size=3)
    loaders: Any = [loader(32), other] if form == "list" else {"labelled": loader(32), "other": other}
    if form in ("combined", "max_size_cycle"):
        loaders = CombinedLoader(loaders, "min_size" if form == "combined" else form)
    model = OfTwo()
    plans = fit(make_trainer, model, loaders, max_epochs=2).plans
    assert model.rows == 3
    assert_same_weights(model, train_by_hand(plans, 2 * batches(32)))


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "one after the other"])
def test_several_loaders_in_one_loss_are_refused(make_trainer: MakeTrainer, joined: bool) -> None:
    class OfBoth(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x, y), (u, v) = batch
            if joined:
                return F.cross_entropy(self(torch.cat([x, u])), torch.cat([y, v]))
            return F.cross_entropy(self(x), y) + F.cross_entropy(self(u), v)

    message = (
        r"no floating point output with the 8 rows in dimension 0: \(16, 8\)"
        if joined
        else "runs 2 times in training_step"
    )
    callback = mixup(layers="first")
    with pytest.raises((ValueError, RuntimeError), match=message):
        make_trainer(callback).fit(OfBoth(), [loader(), loader()])


# What is not training.


def test_sanity_checking_and_validation_are_bit_identical_to_plain(make_trainer: MakeTrainer) -> None:
    model = Validated()
    make_trainer(mixup(), num_sanity_val_steps=2, max_epochs=2, val_check_interval=2).fit(model, loader(), loader())
    plain = Network()
    assert model.validated[:2] == [F.cross_entropy(plain(x), y) for x, y in batches()[:2]]
    assert len(model.validated) == 2 + 2 * 2 * 5  # the sanity check's, and in each epoch after two and four steps


def test_validate_test_and_predict_are_bit_identical_to_plain_after_fit(make_trainer: MakeTrainer) -> None:
    class Complete(Validated):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", self.validation_step(batch, batch_idx))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    model = Complete()
    trainer = make_trainer(mixup(), max_epochs=2)
    trainer.fit(model, loader())
    trainer.validate(model, loader(), verbose=False)
    trainer.test(model, loader(), verbose=False)
    assert len(model.validated) == 2 * 5
    plain = Network()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(torch.cat(trainer.predict(model, loader())), plain(rows()[0]))
    assert_no_trace(model)


# More than one fit, more than one callback.


def test_a_callback_serves_one_module_after_another(make_trainer: MakeTrainer) -> None:
    callback = mixup()
    plans, first, second = Plans(callback), Classifier(), Classifier()
    for model in (first, second):
        make_trainer(callback, plans).fit(model, loader())
        assert_no_trace(first)
    assert_same_weights(first, train_by_hand(plans.plans[:5], batches()))
    assert_same_weights(second, train_by_hand(plans.plans[5:], batches()))


def test_two_callbacks_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises((RuntimeError, ValueError), match="ManifoldMixupCallback"):
        make_trainer(mixup(), mixup()).fit(Classifier(), loader())


def test_a_callback_that_the_module_brings_takes_the_trainers_place(make_trainer: MakeTrainer) -> None:
    class Bringing(Classifier):
        def configure_callbacks(self) -> Any:
            return [own]

    own = mixup(seed=6)
    plans, model = Plans(own), Bringing()
    make_trainer(mixup(), plans).fit(model, loader())
    assert_same_weights(model, train_by_hand(plans.plans, batches()))


@resumes
@pytest.mark.parametrize("steps", [3, 5, 7], ids=["in mid-epoch", "at an epoch's end", "in the second epoch"])
def test_a_run_resumed_from_a_checkpoint_equals_the_straight_run(
    make_trainer: MakeTrainer, tmp_path: Any, steps: int
) -> None:
    def train(ckpt_path: Any = None, **settings: Any) -> Classifier:
        model = Classifier()
        saving = ModelCheckpoint(tmp_path, "part", every_n_train_steps=steps)
        trainer = make_trainer(mixup(), saving, enable_checkpointing=True, max_epochs=3, **settings)
        trainer.fit(model, Resumable(), ckpt_path=ckpt_path)
        return model

    train(max_steps=steps)
    resumed = train(tmp_path / "part.ckpt")
    assert_same_weights(resumed, train(), atol=0)
    assert len(resumed.losses) == 15 - steps


# Copies of the module.


def test_module_and_callback_can_be_pickled_after_fit(make_trainer: MakeTrainer) -> None:
    model, callback = Classifier(), mixup()
    make_trainer(callback).fit(model, loader())
    twin, other = pickle.loads(pickle.dumps((model, callback)))
    assert_no_trace(twin)
    for module, its_callback in ((model, callback), (twin, other)):  # and both go on alike
        make_trainer(its_callback).fit(module, loader())
    assert_same_weights(twin, model, atol=0)


HOOKS = ["on_train_start", "on_before_optimizer_step", "on_train_batch_end"]


@pytest.mark.parametrize("hook", HOOKS)
def test_module_can_be_pickled_during_fit(make_trainer: MakeTrainer, hook: str) -> None:
    model, call = Classifier(), Call(hook, lambda trainer, module: pickle.dumps(module))
    make_trainer(mixup(), call).fit(model, loader())
    _assert_independent(pickle.loads(call.result), model)


@pytest.mark.parametrize("hook", HOOKS)
def test_callback_can_be_pickled_during_fit(make_trainer: MakeTrainer, hook: str) -> None:
    callback = mixup()
    call = Call(hook, lambda trainer, module: pickle.dumps(callback))
    model, again = Classifier(), Classifier()
    make_trainer(callback, call).fit(model, loader())
    make_trainer(pickle.loads(call.result)).fit(again, loader())
    assert_same_weights(again, model, atol=0)


@pytest.mark.parametrize("hook", HOOKS)
def test_module_can_be_copied_during_fit(make_trainer: MakeTrainer, hook: str) -> None:
    model, call = Classifier(), Call(hook, lambda trainer, module: copy.deepcopy(module))
    make_trainer(mixup(), call).fit(model, loader())
    _assert_independent(call.result, model)


def _assert_independent(twin: Any, model: Classifier) -> None:
    """The twin's step is of the twin's own weights, unmixed."""
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.25)
    plain = Network()
    plain.load_state_dict(twin.state_dict())
    x, y = batches()[0]
    assert torch.equal(twin.training_step((x, y), 0), F.cross_entropy(plain(x), y))
    assert twin.training_step.__self__ is twin
    assert twin.losses is not model.losses


def test_the_fitted_module_exports_without_a_trace_of_mixing(make_trainer: MakeTrainer) -> None:
    plain, fitted = Classifier(), Classifier()
    make_trainer(mixup(), max_epochs=2).fit(fitted, loader())
    make_trainer().fit(plain, loader())
    x = batches()[0][0]
    exported, wanted = (torch.export.export(module.eval(), (x,)) for module in (fitted, plain))
    assert str(exported.graph) == str(wanted.graph)
    assert torch.equal(exported.module()(x), fitted(x))
