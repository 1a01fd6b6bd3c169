"""What users of mixup ran into, by the threads they wrote: each is settled by a number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier import Network, Plans, assert_no_trace
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy
from versions import WeightAveraging, answers, averages, compiles

from mm_lightning import ManifoldMixupCallback, MixPlan, PlanSource, mixed_accuracy
from mm_lightning.diagnostics.drawing import log_image
from mm_lightning.models import preact_resnet18

MakeTrainer = Callable[..., pl.Trainer]
LAYERS = ["input", "first", "second"]
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 1, 2, 0])
MULTI_HOT = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.float64)
WEIGHT = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


class Net(Network, pl.LightningModule):
    """The small network, with a training step that a test hands in. It stays where it is: its learning rate is 0."""

    def __init__(self, step: Any = None, lr: float = 0.0) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        self.step = plain if step is None else step
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Batches(list[Any]):
    """A plain loader of given batches."""


class Seen(pl.Callback):
    """Keeps the plan and the loss of every batch that has a plan."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback = callback
        self.steps: list[tuple[MixPlan, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        if self.callback.plan is not None:
            self.steps.append((self.callback.plan, outputs["loss"]))


def plain(net: Any, batch: Any) -> Tensor:
    x, y = batch
    return net.criterion(net(x), y)


def fit_all(
    make_trainer: MakeTrainer, module: pl.LightningModule, batches: list[Any], trainer: Any = None, **settings: Any
) -> list[tuple[MixPlan, Tensor]]:
    """Plan and loss of every batch. ``settings`` are those of the callback, ``trainer`` those of the trainer."""
    callback = ManifoldMixupCallback(**{"layers": "first", "alpha": 1.0, "seed": 4, "schedule": None, **settings})
    seen = Seen(callback)
    make_trainer(callback, seen, **(trainer or {})).fit(module, Batches(batches))
    return seen.steps


def fit_one(
    make_trainer: MakeTrainer, step: Any = None, batch: Any = (X, Y), **settings: Any
) -> tuple[Net, MixPlan, Tensor]:
    """The network, the plan and the loss of one mixed batch."""
    net = Net(step)
    [(plan, loss)] = fit_all(make_trainer, net, [batch], **settings)
    assert plan.mixes
    assert not torch.equal(plan.partner, torch.arange(plan.batch_size))
    return net, plan, loss


def mix(hidden: Tensor, plan: MixPlan) -> Tensor:
    lam = plan.lam.to(hidden.dtype).view(-1, *[1] * (hidden.dim() - 1))  # (N,) -> (N, 1, ..., 1)
    return lam * hidden + (1 - lam) * hidden[plan.partner]


def logits_of(net: Any, x: Tensor, plan: MixPlan) -> Tensor:
    """The forward pass, mixed as planned."""
    x = mix(x, plan) if plan.layer == "input" else x
    for name in ("first", "second"):
        hidden = getattr(net, name)(x)
        x = torch.tanh(mix(hidden, plan) if plan.layer == name else hidden)
    return net.head(x)


def mixed(loss: Any, logits: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
    """``lam * loss(own) + (1 - lam) * loss(partner)``, of one ``lam`` for the batch."""
    lam = plan.lam[0].to(logits.dtype)
    return (lam * loss(logits, y) + (1 - lam) * loss(logits, y[plan.partner])).detach()


def assert_mixed(net: Any, plan: MixPlan, got: Tensor, loss: Any = F.cross_entropy, x: Any = X, y: Any = Y) -> None:
    wanted = mixed(loss, logits_of(net, x, plan), y, plan)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert (wanted - loss(logits_of(net, x, plan), y)).abs() > 1e-3  # own targets alone would be another number


# A. Beside Lightning: pytorch-lightning#790, #1733, #3461, #7789, #17531, #21069, #2953, fastai#3486, #2233, #1997,
# catalyst#200


def test_pytorch_lightning_790_one_line_mixes_an_unmodified_module(make_trainer: MakeTrainer) -> None:
    net, plan, loss = fit_one(make_trainer, layers="auto")
    assert_mixed(net, plan, loss)


def test_pytorch_lightning_1733_the_batch_itself_is_not_changed(make_trainer: MakeTrainer) -> None:
    x, y = X.clone(), Y.clone()
    net, plan, loss = fit_one(make_trainer, batch=(x, y), layers="input")
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert_mixed(net, plan, loss)


def test_pytorch_lightning_3461_a_batch_transform_leaves_training_step_alone(make_trainer: MakeTrainer) -> None:
    net, plan, loss = fit_one(make_trainer, layers="input")
    wanted = mixed(F.cross_entropy, net(mix(X, plan)), Y, plan)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    assert_no_trace(net)


def test_pytorch_lightning_7789_callbacks_before_backward_get_the_mixed_loss(make_trainer: MakeTrainer) -> None:
    class Before(pl.Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
            self.loss = loss.detach().clone()

    callback, before, net = ManifoldMixupCallback(layers="first", seed=4), Before(), Net()
    make_trainer(before, callback).fit(net, Batches([(X, Y)]))
    assert callback.plan is not None
    assert_mixed(net, callback.plan, before.loss)


def test_pytorch_lightning_17531_root_forward_is_the_class_s_own(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        assert "forward" not in net.__dict__
        assert not net._forward_hooks
        return F.cross_entropy(net.head(torch.tanh(net.second(torch.tanh(net.first(batch[0]))))), batch[1])

    net, plan, loss = fit_one(make_trainer, step)
    assert_mixed(net, plan, loss)


def test_pytorch_lightning_17424_a_second_pass_in_a_callback_stays_clean(make_trainer: MakeTrainer) -> None:
    passes = []

    class Clean(pl.Callback):
        @torch.no_grad()
        def _run(self, trainer: Any, module: Net, *_: Any) -> None:
            passes.append(module(X))

        on_train_batch_start = on_before_optimizer_step = on_train_batch_end = _run
        on_before_backward = on_after_backward = _run

    net, callback = Net(), ManifoldMixupCallback(layers="first", seed=4)
    make_trainer(Clean(), callback, Clean()).fit(net, Batches([(X, Y)] * 2))
    assert len(passes) == 2 * 2 * 5
    assert all(torch.equal(logits, net(X)) for logits in passes)


def test_pytorch_lightning_17424_a_second_pass_in_training_step_is_refused(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        with torch.no_grad():
            net(batch[0])
        return plain(net, batch)

    with pytest.raises(ValueError, match="Layer 'first' cannot be mixed: runs 2 times in training_step"):
        fit_one(make_trainer, step)


@averages
@pytest.mark.parametrize("mixup_first", [True, False])
def test_pytorch_lightning_21069_order_beside_weight_averaging_is_free(
    make_trainer: MakeTrainer, mixup_first: bool
) -> None:
    net, callback = Net(lr=0.1), ManifoldMixupCallback(layers=LAYERS, seed=4, schedule=None)
    plans, averaging = Plans(callback), WeightAveraging(avg_fn=lambda old, new, count: old + (new - old) / 4)
    order = [callback, averaging] if mixup_first else [averaging, callback]
    make_trainer(*order, plans).fit(net, Batches([(X, Y)] * 3))
    hand = Net()
    average = copy.deepcopy(list(hand.parameters()))
    for count, plan in enumerate(plans.plans):
        loss = mixed_with_graph(hand, plan)
        for weight, mean, grad in zip(
            hand.parameters(), average, torch.autograd.grad(loss, list(hand.parameters())), strict=True
        ):
            weight.data -= 0.1 * grad
            mean.data = weight.data.clone() if count == 0 else mean.data + (weight.data - mean.data) / 4
    torch.testing.assert_close(list(net.parameters()), average, rtol=0, atol=1e-12)  # the average is copied in


def mixed_with_graph(net: Net, plan: MixPlan) -> Tensor:
    logits, lam = logits_of(net, X, plan), plan.lam[0].double()
    return lam * F.cross_entropy(logits, Y) + (1 - lam) * F.cross_entropy(logits, Y[plan.partner])


def test_pytorch_lightning_2953_a_figure_reaches_tensorboard_at_its_step(tmp_path: Any) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer: Any = SimpleNamespace(loggers=[logger, CSVLogger(tmp_path)], global_step=7)
    log_image(trainer, "figure", np.zeros((50, 100, 3), np.uint8))
    logger.experiment.flush()
    [image] = EventAccumulator(logger.log_dir).Reload().Images("figure")
    assert (image.step, image.width, image.height) == (7, 100, 50)


def test_fastai_3486_training_after_lr_find_is_mixed_and_leaves_nothing(make_trainer: MakeTrainer) -> None:
    net, callback = Net(lr=0.1), ManifoldMixupCallback(layers="first", alpha=1.0, seed=4, schedule=None)
    trainer, seen, wanted = make_trainer(callback), Seen(callback), plain(net, (X, Y))
    trainer.callbacks.append(seen)
    Tuner(trainer).lr_find(net, Batches([(X, Y)] * 20), num_training=5, update_attr=False)
    assert torch.equal(net.training_step((X, Y), 0), wanted)
    trainer.fit(net, Batches([(X, Y)]))
    [(plan, loss)] = seen.steps
    assert_mixed(Net(), plan, loss)
    assert_no_trace(net)


def test_fastai_2233_lr_find_in_mixed_precision_measures_as_without_mixup(make_trainer: MakeTrainer) -> None:
    losses = []
    for callbacks in ([], [ManifoldMixupCallback(layers="first")]):
        net, trainer = Net(lr=0.1).float(), make_trainer(*callbacks, precision="bf16-mixed")
        batches = Batches([(X.float(), Y)] * 20)
        found = Tuner(trainer).lr_find(net, batches, num_training=5, update_attr=False)
        assert found is not None
        losses.append(found.results["loss"])
        trainer.fit(net, batches)
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_fastai_1997_the_loss_is_the_same_object_after_a_failure(
    make_trainer: MakeTrainer, error: type[BaseException]
) -> None:
    class Failing(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise error("broken")

    net = Net()
    criterion, function, wanted = net.criterion, F.cross_entropy, plain(net, (X, Y))
    with answers(error):
        make_trainer(ManifoldMixupCallback(layers="first", loss="criterion"), Failing()).fit(net, Batches([(X, Y)]))
    assert net.criterion is criterion
    assert F.cross_entropy is function
    assert torch.equal(net.training_step((X, Y), 0), wanted)


def test_catalyst_200_validation_is_unmixed(make_trainer: MakeTrainer) -> None:
    values = []

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            values.append(self.training_step(batch, batch_idx))

    net = Validated()
    make_trainer(ManifoldMixupCallback(layers=LAYERS)).fit(net, Batches([(X, Y)] * 2), Batches([(X, Y)]))
    assert len(values) == 2  # with the sanity check
    assert all(torch.equal(value, plain(net, (X, Y))) for value in values)


def test_catalyst_200_a_none_batch_is_passed_over(make_trainer: MakeTrainer) -> None:
    net = Net()
    with pytest.warns(UserWarning, match="yielded None"):
        steps = fit_all(make_trainer, net, [None, (X, Y)])
    assert len(steps) == 1
    assert_mixed(net, *steps[0])


# B. Metrics: torchmetrics#449, #245, manifold_mixup#9, mixup-cifar10#7, mmpretrain#206, CutMix#18, composer#825


def test_torchmetrics_449_a_metric_gets_class_indices(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        logits = net(batch[0])
        net.accuracy = MulticlassAccuracy(3, average="micro")(logits, batch[1])
        assert batch[1].dtype == torch.int64
        return F.cross_entropy(logits, batch[1])

    net, plan, loss = fit_one(make_trainer, step)
    assert float(net.accuracy) == pytest.approx(float((logits_of(net, X, plan).argmax(1) == Y).float().mean()))
    assert_mixed(net, plan, loss)


def test_torchmetrics_245_half_precision_logits_are_counted_alike() -> None:
    logits = torch.tensor([[2, 1, 0], [2, 1, 0], [0, 1, 2], [0, 2, 1]], dtype=torch.float16)
    plan = MixPlan("first", torch.tensor([1, 0, 3, 2]), torch.full((4,), 0.25))
    # own 0 2 2 1 hits rows 0, 2, 3; the partners' 2 0 1 2 hit row 1
    assert float(mixed_accuracy(logits, torch.tensor([0, 2, 2, 1]), plan)) == (3 * 0.25 + 1 * 0.75) / 4


def logged(make_trainer: MakeTrainer, tmp_path: Any) -> tuple[Net, MixPlan, dict[str, float]]:
    net, callback = Net(), ManifoldMixupCallback(layers="first", alpha=1.0, seed=4)
    trainer = make_trainer(callback, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(net, Batches([(X, Y)]))
    assert callback.plan is not None
    return net, callback.plan, {key: float(value) for key, value in trainer.logged_metrics.items()}


def test_manifold_mixup_9_train_accuracy_is_weighed_by_lam(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    net, plan, values = logged(make_trainer, tmp_path)
    wanted = mixed(lambda logits, y: (logits.argmax(1) == y).double().mean(), logits_of(net, X, plan), Y, plan)
    assert values["mixup/acc_mixed"] == pytest.approx(float(wanted), abs=1e-6)


def test_mixup_cifar10_7_the_weighted_accuracy_is_not_rounded() -> None:
    plan = MixPlan("first", torch.tensor([1, 0]), torch.full((2,), 0.75))
    assert float(mixed_accuracy(torch.eye(2), torch.tensor([0, 1]), plan)) == 0.75
    assert float(mixed_accuracy(torch.eye(2), torch.tensor([1, 0]), plan)) == 0.25


def test_mmpretrain_206_a_head_that_counts_hits_gets_class_indices(make_trainer: MakeTrainer) -> None:
    class Head(nn.Module):
        def forward(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return F.cross_entropy(logits, y), (logits.detach().argmax(1) == y).sum()

    def step(net: Net, batch: Any) -> Tensor:
        loss, hits = Head()(net(batch[0]), batch[1])
        net.hits = int(hits)
        return loss

    net, plan, loss = fit_one(make_trainer, step)
    assert net.hits == int((logits_of(net, X, plan).argmax(1) == Y).sum())
    assert_mixed(net, plan, loss)


def test_cutmix_18_the_entropy_below_the_loss_is_logged(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    _, plan, values = logged(make_trainer, tmp_path)
    lam = plan.lam[0].double()
    entropy = -(lam * lam.log() + (1 - lam) * (1 - lam).log())
    wanted = entropy * (Y[plan.partner] != Y).double().mean()
    assert values["mixup/loss_floor"] == pytest.approx(float(wanted), abs=1e-6)


def test_composer_825_the_logged_loss_is_the_mixed_one(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        loss = plain(net, batch)
        net.log("loss", loss)
        return loss

    net, callback = Net(step), ManifoldMixupCallback(layers="first", alpha=1.0, seed=4)
    trainer = make_trainer(callback)
    trainer.fit(net, Batches([(X, Y)] * 3))
    assert callback.plan is not None
    wanted = mixed(F.cross_entropy, logits_of(net, X, callback.plan), Y, callback.plan)
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(wanted), abs=1e-6)  # logged as float32


# C. Both or neither: ManifoldMixup#1, manifold_mixup#12, tsai#791, VMT#1, YOLOX#275, braindecode#1121, deit#91,
# manifold_mixup#8


def watched(make_trainer: MakeTrainer, layer: str, behind: str) -> tuple[Net, MixPlan, Tensor, Tensor]:
    """The same as ``fit_one``, and what the module ``behind`` was given."""
    seen: list[Tensor] = []

    def step(net: Net, batch: Any) -> Tensor:
        handle = net.get_submodule(behind).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        loss = plain(net, batch)
        handle.remove()
        return loss

    net, plan, loss = fit_one(make_trainer, step, layers=layer)
    return net, plan, loss, seen[-1].as_subclass(Tensor)


def test_manifold_mixup_pull_1_the_hidden_state_itself_is_mixed(make_trainer: MakeTrainer) -> None:
    net, plan, _, hidden = watched(make_trainer, "first", behind="second")
    wanted = torch.tanh(mix(net.first(X), plan)).detach()
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-12)
    assert (hidden - torch.tanh(net.first(X))).abs().max() > 1e-2


def test_manifold_mixup_12_a_discarded_mix_is_refused(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        net.first(batch[0])
        hidden = F.linear(batch[0], net.first.weight, net.first.bias)
        return F.cross_entropy(net.head(torch.tanh(net.second(torch.tanh(hidden)))), batch[1])

    with pytest.raises((RuntimeError, ValueError), match="'first'"):
        fit_one(make_trainer, step)


def test_tsai_791_the_labels_are_mixed_too(make_trainer: MakeTrainer) -> None:
    net, plan, loss = fit_one(make_trainer)
    only_features = F.cross_entropy(logits_of(net, X, plan), Y)
    lam = plan.lam[0].double()
    wanted = only_features + (1 - lam) * (
        F.cross_entropy(logits_of(net, X, plan), Y[plan.partner]) - F.cross_entropy(logits_of(net, X, plan), Y)
    )
    torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)
    assert (loss - only_features).abs() > 1e-3


def test_tsai_683_features_without_labels_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match="no loss on the batch's targets was seen"):
        fit_one(make_trainer, lambda net, batch: net(batch[0]).square().mean())


def test_vmt_1_images_and_labels_share_their_partners(make_trainer: MakeTrainer) -> None:
    net, plan, loss, x = watched(make_trainer, "input", behind="first")
    lam = plan.lam[0].double()
    partner = torch.cdist((x - lam * X) / (1 - lam), X).argmin(dim=1)  # read off the images alone
    losses = [F.cross_entropy(net(x), y).detach() for y in (Y, Y[partner])]
    torch.testing.assert_close(loss, lam * losses[0] + (1 - lam) * losses[1], rtol=0, atol=1e-12)


def test_yolox_275_labels_are_not_written_to(make_trainer: MakeTrainer) -> None:
    y = Y.clone()
    version = y._version
    net, plan, loss = fit_one(make_trainer, batch=(X, y))
    assert y._version == version
    assert y.tolist() == [0, 1, 2, 1, 2, 0]
    assert_mixed(net, plan, loss)


def test_braindecode_1121_a_named_loss_gets_the_same_targets(make_trainer: MakeTrainer) -> None:
    net, plan, followed = fit_one(make_trainer)
    _, _, named = fit_one(make_trainer, loss="criterion")
    assert_mixed(net, plan, followed)
    torch.testing.assert_close(named, followed, rtol=0, atol=1e-12)


def test_deit_91_an_unmixed_batch_has_the_plain_loss(make_trainer: MakeTrainer) -> None:
    net = Net()
    steps = fit_all(make_trainer, net, [(X, Y)] * 8, probability=0.5)
    assert 0 < sum(plan.mixes for plan, _ in steps) < 8
    for plan, loss in steps:
        wanted = mixed(F.cross_entropy, logits_of(net, X, plan), Y, plan) if plan.mixes else plain(net, (X, Y))
        torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)


def test_manifold_mixup_8_auto_chooses_after_early_residual_stages(make_trainer: MakeTrainer) -> None:
    class Residual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = preact_resnet18(width=4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = ManifoldMixupCallback()
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    make_trainer(callback).fit(Residual(), Batches([(x, Y)]))
    assert callback.layer_names == ("input", "net.layer1", "net.layer2")


# D. Targets and losses: fastai#3183, #2286, #256, timm#46, manifold_mixup#7, TokenLabeling#11, focal-loss#2,
# composer#1407, vision#9215, keras-cv#1025, vision#8693, fastai#2112, keras-cv#445, MixText#3, senpai#2237,
# PointMixup#2


def loss_step(loss: Any) -> Any:
    return lambda net, batch: loss(net(batch[0]), batch[1])


def focal(logits: Tensor, y: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, dim=1).gather(1, y[:, None])
    return -((1 - log_probs.exp()) ** 2 * log_probs).mean()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda logits, y: F.nll_loss(F.log_softmax(logits, 1), y), id="nll"),
        pytest.param(F.multi_margin_loss, id="margin"),
        pytest.param(lambda logits, y: (logits[:, 0] - y).abs().pow(1.5).mean(), id="by-hand"),
    ],
)
def test_fastai_3183_losses_other_than_cross_entropy_are_mixed(make_trainer: MakeTrainer, loss: Any) -> None:
    net, plan, got = fit_one(make_trainer, loss_step(loss))
    assert_mixed(net, plan, got, loss)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_fastai_2286_every_reduction_is_kept(make_trainer: MakeTrainer, reduction: str) -> None:
    rows = torch.arange(1.0, 7.0, dtype=torch.float64)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(logits, y, reduction=reduction)
        return (value * rows[y]).sum() if reduction == "none" else value

    net, plan, got = fit_one(make_trainer, loss_step(loss))
    assert_mixed(net, plan, got, loss)


def test_fastai_dev_256_multi_label_targets_are_mixed(make_trainer: MakeTrainer) -> None:
    loss = F.binary_cross_entropy_with_logits
    net, plan, got = fit_one(make_trainer, loss_step(loss), (X, MULTI_HOT))
    assert_mixed(net, plan, got, loss, y=MULTI_HOT)


def test_timm_46_the_mixed_loss_is_that_of_soft_targets(make_trainer: MakeTrainer) -> None:
    net, plan, loss = fit_one(make_trainer)
    soft = mix(F.one_hot(Y, 3).double(), plan)
    torch.testing.assert_close(loss, F.cross_entropy(logits_of(net, X, plan), soft).detach(), rtol=0, atol=1e-12)


def test_manifold_mixup_7_binary_cross_entropy_on_softmax_is_mixed(make_trainer: MakeTrainer) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(logits.softmax(1), F.one_hot(y, 3).to(logits.dtype))

    net, plan, got = fit_one(make_trainer, loss_step(loss))
    assert_mixed(net, plan, got, loss)
    probabilities, soft = logits_of(net, X, plan).softmax(1), mix(F.one_hot(Y, 3).double(), plan)
    torch.testing.assert_close(got, F.binary_cross_entropy(probabilities, soft).detach(), rtol=0, atol=1e-12)


def test_token_labeling_11_class_weights_keep_their_normaliser(make_trainer: MakeTrainer) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, weight=WEIGHT)

    net, plan, got = fit_one(make_trainer, loss_step(loss))
    assert_mixed(net, plan, got, loss)


def test_focal_loss_pytorch_2_focal_loss_keeps_class_indices(make_trainer: MakeTrainer) -> None:
    net, plan, got = fit_one(make_trainer, loss_step(focal))
    assert_mixed(net, plan, got, focal)


def test_composer_1407_label_smoothing_stays_with_the_loss(make_trainer: MakeTrainer) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=0.1)

    net, plan, got = fit_one(make_trainer, loss_step(loss))
    assert_mixed(net, plan, got, loss)


@pytest.mark.parametrize("layer", LAYERS)
def test_vision_9215_segmentation_masks_are_mixed(make_trainer: MakeTrainer, layer: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 2, 5, 4, generator=generator, dtype=torch.float64)  # (N, H, W, C)
    y = torch.randint(0, 3, (6, 2, 5), generator=generator)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.movedim(-1, 1), y)

    net, plan, got = fit_one(make_trainer, loss_step(loss), (x, y), layers=layer)
    assert_mixed(net, plan, got, loss, x=x, y=y)


def test_keras_cv_1025_every_output_of_a_dict_of_labels_is_mixed(make_trainer: MakeTrainer) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        logits = net(batch["image"])
        parts = F.cross_entropy(logits, batch["labels"]["kind"]), F.mse_loss(logits, batch["labels"]["place"])
        return parts[0] + 2 * parts[1]

    net, plan, got = fit_one(make_trainer, step, {"image": X, "labels": {"kind": Y, "place": MULTI_HOT}})
    logits = logits_of(net, X, plan)
    wanted = mixed(F.cross_entropy, logits, Y, plan) + 2 * mixed(F.mse_loss, logits, MULTI_HOT, plan)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_vision_8693_several_inputs_are_mixed_with_one_plan(make_trainer: MakeTrainer) -> None:
    other = X.flip(0) ** 2

    def step(net: Net, batch: Any) -> Tensor:
        (left, right), y = batch
        return F.cross_entropy(net(left * torch.exp(right)), y)

    net, plan, got = fit_one(make_trainer, step, ((X, other), Y), layers="input")
    logits = net(mix(X, plan) * torch.exp(mix(other, plan)))
    torch.testing.assert_close(got, mixed(F.cross_entropy, logits, Y, plan), rtol=0, atol=1e-12)


def test_fastai_2112_categories_and_numbers_of_a_table_are_mixed(make_trainer: MakeTrainer) -> None:
    categories = torch.tensor([[0], [1], [2], [3], [1], [0]])

    class Table(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, b: F.cross_entropy(net(net.embedding(b[0][0]).squeeze(1) + b[0][1]), b[1]))
            self.embedding = nn.Embedding.from_pretrained(X[:4].exp(), freeze=False)

    net = Table()
    [(plan, got)] = fit_all(make_trainer, net, [([categories, X], Y)], layers="input")
    x = mix(net.embedding(categories).squeeze(1), plan) + mix(X, plan)
    torch.testing.assert_close(got, mixed(F.cross_entropy, net(x), Y, plan), rtol=0, atol=1e-12)


def test_keras_cv_445_one_hot_labels_give_the_loss_of_indices(make_trainer: MakeTrainer) -> None:
    net, plan, of_indices = fit_one(make_trainer)
    _, _, of_one_hot = fit_one(make_trainer, batch=(X, F.one_hot(Y, 3).double()))
    assert_mixed(net, plan, of_indices)
    torch.testing.assert_close(of_one_hot, of_indices, rtol=0, atol=1e-12)


@pytest.mark.parametrize("union", [True, False], ids=["union", "own"])
def test_mixtext_3_a_mixed_row_attends_to_the_tokens_of_both(make_trainer: MakeTrainer, union: bool) -> None:
    class Text(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, batch: F.cross_entropy(net.score(net.first(batch[0]), batch[1]), batch[2]))
            torch.manual_seed(0)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()

        def score(self, hidden: Tensor, padding: Tensor) -> Tensor:
            return self.head(self.encoder(hidden, src_key_padding_mask=padding)[:, 0])

    tokens = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([1, 5, 2, 3, 4, 2])[:, None]
    net = Text()
    [(plan, got)] = fit_all(make_trainer, net, [(tokens, padding, Y)], union_masks=union)
    masks = {True: padding & padding[plan.partner], False: padding}
    wanted = {
        which: mixed(F.cross_entropy, net.score(mix(net.first(tokens), plan), mask), Y, plan)
        for which, mask in masks.items()
    }
    torch.testing.assert_close(got, wanted[union], rtol=0, atol=1e-12)
    assert (wanted[True] - wanted[False]).abs() > 1e-4


def test_senpai_2237_regression_is_mixed_by_its_own_loss(make_trainer: MakeTrainer) -> None:
    net, plan, got = fit_one(make_trainer, loss_step(F.mse_loss), (X, MULTI_HOT))
    logits, lam = logits_of(net, X, plan).detach(), plan.lam[0].double()
    of_mixed_targets = F.mse_loss(logits, mix(MULTI_HOT, plan))
    spread = lam * (1 - lam) * (MULTI_HOT - MULTI_HOT[plan.partner]).square().mean()
    torch.testing.assert_close(got, of_mixed_targets + spread, rtol=0, atol=1e-12)


def test_point_mixup_2_batch_norm_sees_the_mixed_batch_once(make_trainer: MakeTrainer) -> None:
    net = Net()
    net.second = nn.Sequential(nn.BatchNorm1d(8, dtype=torch.float64), net.second)
    [(plan, _)] = fit_all(make_trainer, net, [(X, Y)])
    wanted = 0.1 * torch.tanh(mix(net.first(X), plan)).mean(0).detach()
    torch.testing.assert_close(net.second[0].running_mean, wanted, rtol=0, atol=1e-12)
    assert int(net.second[0].num_batches_tracked) == 1


# E. Batch sizes and dtypes: timm#1304, vision#4379, BirdSet#274, kornia#4363, ManifoldMixupV2#1, composer#875


@pytest.mark.parametrize("size", [2, 3, 5])
def test_timm_1304_batches_of_any_size_are_mixed(make_trainer: MakeTrainer, size: int) -> None:
    net = Net()
    steps = fit_all(make_trainer, net, [(X[:size], Y[:size])] * 4)
    for plan, loss in steps:
        assert sorted(plan.partner.tolist()) == list(range(size))
        wanted = mixed(F.cross_entropy, logits_of(net, X[:size], plan), Y[:size], plan)
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    assert any(plan.partner.tolist() != list(range(size)) for plan, _ in steps)


def test_keras_mixup_generator_1_a_short_last_batch_is_mixed(make_trainer: MakeTrainer) -> None:
    net = Net()
    _, (plan, loss) = fit_all(make_trainer, net, [(X, Y), (X[3:], Y[3:])], layers=LAYERS)
    assert plan.batch_size == 3
    wanted = mixed(F.cross_entropy, logits_of(net, X[3:], plan), Y[3:], plan)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)


def test_birdset_274_a_batch_of_one_has_the_plain_loss(make_trainer: MakeTrainer) -> None:
    net = Net()
    with pytest.warns(UserWarning, match="one row has no partner"):
        [(plan, loss)] = fit_all(make_trainer, net, [(X[:1], Y[:1])])
    assert not plan.mixes
    assert torch.equal(loss, plain(net, (X[:1], Y[:1])).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kornia_4363_the_mixed_state_keeps_its_dtype(make_trainer: MakeTrainer, dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def step(net: Net, batch: Any) -> Tensor:
        seen.append(net.first(batch[0]))
        return F.cross_entropy(net.head(torch.tanh(net.second(torch.tanh(seen[-1])))), batch[1])

    net = Net(step).to(dtype)
    [(plan, _)] = fit_all(make_trainer, net, [(X.to(dtype), Y)])
    hidden = seen[-1].detach().as_subclass(Tensor)
    assert hidden.dtype == dtype
    wanted = mix(net.first(X.to(dtype)).double(), plan).detach()
    torch.testing.assert_close(hidden.double(), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_manifold_mixup_v2_1_autocast_loss_is_the_mixed_one(make_trainer: MakeTrainer) -> None:
    net = Net().float()
    [(plan, loss)] = fit_all(make_trainer, net, [(X.float(), Y)], {"precision": "bf16-mixed"})
    wanted = mixed(F.cross_entropy, logits_of(net, X.float(), plan), Y, plan)
    torch.testing.assert_close(loss.float(), wanted, rtol=0, atol=0.02)


def test_composer_875_each_accumulated_batch_has_its_own_plan(make_trainer: MakeTrainer) -> None:
    net = Net(lr=1.0)
    steps = fit_all(make_trainer, net, [(X, Y)] * 2, {"accumulate_grad_batches": 2})
    plans, hand = [plan for plan, _ in steps], Net()
    assert plans[0].lam[0] != plans[1].lam[0]
    loss = (mixed_with_graph(hand, plans[0]) + mixed_with_graph(hand, plans[1])) / 2
    grads = torch.autograd.grad(loss, list(hand.parameters()))
    wanted = [weight - grad for weight, grad in zip(hand.parameters(), grads, strict=True)]
    torch.testing.assert_close(list(net.parameters()), wanted, rtol=0, atol=1e-12)


# F. Randomness: pytorch-lightning#16166, #20412, #17543, composer#793, CutMix#4


def test_pytorch_lightning_16166_ranks_draw_their_own_partners() -> None:
    plans = [PlanSource(LAYERS, seed=4).draw(64, epoch=1, batch_index=2, rank=rank) for rank in range(4)]
    assert len({plan.layer for plan in plans}) == 1
    assert len({float(plan.lam[0]) for plan in plans}) == 4
    assert len({tuple(plan.partner.tolist()) for plan in plans}) == 4


def test_pytorch_lightning_20412_epochs_draw_anew(make_trainer: MakeTrainer) -> None:
    pl.seed_everything(1)
    steps = fit_all(make_trainer, Net(), [(X, Y)] * 2, {"max_epochs": 3})
    assert len({float(plan.lam[0]) for plan, _ in steps}) == 6


def test_pytorch_lightning_17543_two_steps_and_two_are_four(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    straight, half, resumed = Net(lr=0.1), Net(lr=0.1), Net(lr=0.1)
    for net, epochs, start in ((straight, 2, None), (half, 1, None), (resumed, 2, tmp_path / "half.ckpt")):
        trainer = make_trainer(ManifoldMixupCallback(layers=LAYERS, seed=4), max_epochs=epochs)
        trainer.fit(net, Batches([(X, Y)] * 2), ckpt_path=start)
        if net is half:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
    for wanted, got, old in zip(straight.parameters(), resumed.parameters(), half.parameters(), strict=True):
        assert torch.equal(wanted, got)
        assert not torch.equal(old, got)


def test_composer_793_the_user_s_random_numbers_are_the_same(make_trainer: MakeTrainer) -> None:
    draws: dict[float, list[float]] = {0.0: [], 1.0: []}
    for alpha, drawn in draws.items():

        class Drawing(pl.Callback):
            def on_before_backward(self, *_: Any, drawn: list[float] = drawn) -> None:
                drawn.append(float(torch.rand(())))

        torch.manual_seed(8)
        step = lambda net, batch: plain(net, (F.dropout(batch[0]), batch[1]))  # noqa: E731
        make_trainer(ManifoldMixupCallback(alpha, layers="first"), Drawing()).fit(Net(step), Batches([(X, Y)] * 3))
    assert len(set(draws[0.0])) == 3
    assert draws[0.0] == draws[1.0]


def test_cutmix_4_a_lam_for_each_row_weighs_that_row(make_trainer: MakeTrainer) -> None:
    net, plan, loss = fit_one(make_trainer, per_sample=True)
    lam, logits = plan.lam.double(), logits_of(net, X, plan)
    assert len(lam.unique()) == 6
    losses = [F.cross_entropy(logits, y, reduction="none") for y in (Y, Y[plan.partner])]
    wanted = (lam * losses[0] + (1 - lam) * losses[1]).mean().detach()
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)


# G. Compilers and checkpointing: pytorch#117758, #81296, #190758


@compiles
@pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
def test_pytorch_117758_a_compiled_network_is_mixed(make_trainer: MakeTrainer) -> None:
    torch._dynamo.reset()
    net = Net()
    net.compile(backend="eager")
    steps = fit_all(make_trainer, net, [(X, Y)] * 6, layers=LAYERS)
    assert {plan.layer for plan, _ in steps} == set(LAYERS)
    for plan, loss in steps:
        wanted = mixed(F.cross_entropy, logits_of(net, X, plan), Y, plan)
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_pytorch_81296_recomputed_states_are_mixed_alike(make_trainer: MakeTrainer, reentrant: bool) -> None:
    def step(net: Net, batch: Any) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return torch.tanh(net.second(torch.tanh(net.first(x))))

        x = batch[0].clone().requires_grad_()
        return F.cross_entropy(net.head(checkpoint(body, x, use_reentrant=reentrant)), batch[1])

    net, hand = Net(step, lr=1.0), Net()
    [(plan, _)] = fit_all(make_trainer, net, [(X, Y)])
    grads = torch.autograd.grad(mixed_with_graph(hand, plan), list(hand.parameters()))
    wanted = [weight - grad for weight, grad in zip(hand.parameters(), grads, strict=True)]
    torch.testing.assert_close(list(net.parameters()), wanted, rtol=0, atol=1e-12)


# H. timm#8, PaddleClas#2942


def test_timm_8_lam_is_used_as_drawn(make_trainer: MakeTrainer) -> None:
    _, plan, _, x = watched(make_trainer, "input", behind="first")
    difference = X - X[plan.partner]
    lam = ((x - X[plan.partner]) * difference).sum() / difference.square().sum()
    drawn = PlanSource(["input"], ratio=ManifoldMixupCallback(alpha=1.0).ratio, seed=4).draw(6)
    assert float(lam) == pytest.approx(float(drawn.lam[0]), abs=1e-12)


def test_paddle_clas_2942_multi_label_loss_is_that_of_soft_targets(make_trainer: MakeTrainer) -> None:
    loss = F.multilabel_soft_margin_loss
    net, plan, got = fit_one(make_trainer, loss_step(loss), (X, MULTI_HOT), layers=LAYERS)
    assert_mixed(net, plan, got, loss, y=MULTI_HOT)
    wanted = loss(logits_of(net, X, plan), mix(MULTI_HOT, plan)).detach()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
