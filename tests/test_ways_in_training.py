"""Ways to mix in the course of training: beside the mixed loss, over time, changed on the way, and refused."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_ways import (
    Batches,
    Network,
    Plans,
    assert_weights,
    hidden_states,
    images,
    mixup,
    plan_by_hand,
    reference_cutmix,
    reference_linear,
    reference_step,
    sequences,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric
from versions import compiles, resumes

from mm_lightning import ManifoldMixupCallback, MixableModule
from mm_lightning.mixup import (
    Alternating,
    BetaRatio,
    ChannelMix,
    ConfidentWithUnconfident,
    Constant,
    CutMix,
    FixedRatio,
    FoldedRatio,
    FromBatch,
    LinearSchedule,
    Mixer,
    MixPlan,
    NearestNeighbors,
    NoisyFeatures,
    PatchUp,
    PlanSource,
    Progress,
    RandomPermutation,
    Roll,
    SameClass,
    SimilarityRatio,
    TokenMix,
    UniformRatio,
    Until,
    interpolate,
    linear,
    mixed_cross_entropy,
    resolve_layers,
)

MakeTrainer = Callable[..., pl.Trainer]


def data(count: int = 4, rows: int = 6) -> Batches:
    return Batches(images(rows, seed) for seed in range(count))


def weights_of(net: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in net.state_dict().values()]


def fit(
    make_trainer: MakeTrainer, net: pl.LightningModule, batches: Any, callback: Any = None, **options: Any
) -> list[MixPlan]:
    """Train, and return the plans."""
    if callback is None:
        make_trainer(**options).fit(net, batches)
        return []
    plans = Plans(callback)
    make_trainer(callback, plans, **options).fit(net, batches)
    return plans.used


class Busy(Network):
    """Whose step leaves traces of all kinds, and draws noise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3, dtype=torch.float64), nn.Dropout(0.3)
        self.metric = MeanMetric()
        self.count, self.history = 0, list[int]()
        self.lr = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = torch.tanh(self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))).mean(dim=(2, 3))
        return self.head(torch.tanh(self.hidden(pooled)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch["x"])
        loss = F.cross_entropy(logits, batch["y"])
        self.count += 1
        self.history.append(batch_idx)
        self.metric(logits.argmax(dim=1).double())
        self.noise = torch.rand(1) + float(np.random.rand())  # noqa: NPY002
        self.log("loss", loss)
        self.seen.append({})
        return {"loss": loss, "extra": logits.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def traces_of_a_fit(make_trainer: MakeTrainer, callback: Any) -> tuple[Busy, dict[str, Any]]:
    net = Busy()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    trainer = make_trainer(*([] if callback is None else [callback]))
    trainer.fit(net, data(3))
    traces = {
        "weights": weights_of(net),
        "count": net.count,
        "history": net.history,
        "metric": (float(net.metric.mean_value), float(net.metric.weight)),
        "noise": float(net.noise),
        "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }
    return net, traces


def test_a_run_on_the_unmixed_batch_leaves_no_trace(make_trainer: MakeTrainer) -> None:
    plain, _ = traces_of_a_fit(make_trainer, None)
    mixed, expected = traces_of_a_fit(make_trainer, mixup(layers=["input", "second"]))
    both, got = traces_of_a_fit(make_trainer, mixup(layers=["input", "second"], clean_weight=0.5))
    assert len(got["weights"]) == len(expected["weights"])
    for one, other in zip(got.pop("weights"), expected.pop("weights"), strict=True):
        assert torch.equal(one, other)  # buffers: nothing was trained
    assert got == expected
    for i in range(3):  # and it drops the same features out as the step itself would have
        clean = plain.seen[i]["loss"]
        assert_close(both.seen[i]["loss"], mixed.seen[i]["loss"] + 0.5 * clean, rtol=0, atol=1e-12)


class Emptying(Network):
    """Whose step takes its batch apart and writes into it."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        targets = batch.pop("y")
        x = batch["x"].mul_(2)
        return super().training_step({"x": x.clone(), "y": targets}, batch_idx)


class Doubling(Network):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({"x": 2 * batch["x"], "y": batch["y"]}, batch_idx)


@pytest.mark.parametrize(
    "settings",
    [{"clean_weight": 0.5}, {"pairing": ConfidentWithUnconfident()}],
    ids=["clean_weight", "logits"],
)
def test_the_mixed_run_gets_the_batch_as_the_unmixed_one_got_it(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    nets = [Emptying(), Doubling()]
    for net in nets:
        fit(make_trainer, net, data(), mixup(layers="first", **settings))
    for one, other in zip(*map(weights_of, nets), strict=True):
        assert_close(one, other, rtol=0, atol=1e-13)


def test_with_the_weight_zero_nothing_is_added(make_trainer: MakeTrainer) -> None:
    nets = [Network(), Network()]
    fit(make_trainer, nets[0], data(), mixup(layers="first"))
    fit(make_trainer, nets[1], data(), mixup(layers="first", clean_weight=0))
    assert all(map(torch.equal, weights_of(nets[0]), weights_of(nets[1])))


class Manual(Network):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self(batch["x"]), batch))
        optimizer.step()

    def on_before_backward(self, loss: Tensor) -> None:
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        return None


def test_manual_optimization_is_mixed_but_has_no_loss_to_add_to(make_trainer: MakeTrainer) -> None:
    manual, automatic = Manual(), Network()
    for net in (manual, automatic):
        fit(make_trainer, net, data(), mixup(layers="first", interpolation=CutMix(), pairing=SameClass()))
    for one, other in zip(weights_of(manual), weights_of(automatic), strict=True):
        assert_close(one, other, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match=r"^Manual optimizes manually, so that clean_weight has no loss to add to\."):
        fit(make_trainer, Manual(), data(), mixup(layers="first", clean_weight=1.0))


class TwoTargets(Network):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["x"])
        self.seen.append({})
        return F.cross_entropy(logits, batch["y"]) + F.cross_entropy(logits, batch["z"])


def two_targets(count: int = 3) -> Batches:
    return Batches({**batch, "z": (batch["y"] + i) % 3} for i, batch in enumerate(data(count)))


def test_several_targets_must_be_told_apart(make_trainer: MakeTrainer) -> None:
    with pytest.raises(
        ValueError,
        match=r"^The pairing or the ratio asks for the targets, but the loss compares with 2 parts of the batch: 'y', "
        r"'z'\. Say which: ManifoldMixupCallback\(targets=\.\.\.\)\.$",
    ):
        fit(make_trainer, TwoTargets(), two_targets(), mixup(layers="first", pairing=SameClass()))
    for name in ("y", "z"):
        plans = fit(make_trainer, TwoTargets(), two_targets(), mixup(layers="first", pairing=SameClass(), targets=name))
        for plan, batch in zip(plans, two_targets(), strict=True):
            assert torch.equal(batch[name][plan.partner], batch[name])
    with pytest.raises(ValueError, match=r"^targets must name a part of the batch, got 'w'\. It has 'x', 'y', "):
        fit(make_trainer, TwoTargets(), two_targets(), mixup(layers="first", pairing=SameClass(), targets="w"))


def arrays(count: int = 3, kind: Callable[[Tensor], Any] = Tensor.numpy) -> Batches:
    return Batches({**batch, "y": kind(batch["y"])} for batch in data(count))


class OfArrays(Network):
    def loss(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(logits, torch.as_tensor(batch["y"]))


@pytest.mark.parametrize("kind", [Tensor.numpy, Tensor.tolist], ids=["arrays", "lists"])
def test_targets_that_are_no_tensors_are_found_by_their_name(make_trainer: MakeTrainer, kind: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"^The pairing or the ratio asks for the targets, but the loss compares with 0 parts of the batch: none",
    ):
        fit(make_trainer, OfArrays(), arrays(3, kind), mixup(layers="first", pairing=SameClass()))
    nets = [OfArrays(), Network()]
    for net, batches in zip(nets, (arrays(3, kind), data(3)), strict=True):
        plans = fit(make_trainer, net, batches, mixup(layers="first", pairing=SameClass(), targets="y"))
        for plan, batch in zip(plans, data(3), strict=True):
            assert torch.equal(batch["y"][plan.partner], batch["y"])
    assert_close(weights_of(nets[0]), weights_of(nets[1]), rtol=0, atol=1e-14)


class Scoring(Network):
    """Without a cross-entropy of PyTorch, as modules of other libraries are."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return -logits.log_softmax(dim=1).gather(1, batch["y"][:, None]).mean()


def test_scores_that_are_not_seen_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(
        ValueError, match=r"^The pairing or the ratio asks for logits, but training_step calls no torch\.nn\.fun"
    ):
        fit(make_trainer, Scoring(), data(), mixup(layers="first", pairing=ConfidentWithUnconfident()))


@pytest.mark.parametrize(
    "settings",
    [{"interpolation": CutMix()}, {"pairing": NearestNeighbors()}, {"clean_weight": 0.5}],
    ids=["cutmix", "nearest", "clean"],
)
def test_a_loss_of_ones_own_is_mixed_alike(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    nets = [Network(), Scoring()]
    for net in nets:
        fit(make_trainer, net, data(), mixup(layers=["input", "first"], **settings))
    for one, other in zip(weights_of(nets[0]), weights_of(nets[1]), strict=True):
        assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "settings",
    [{"ratio": SimilarityRatio()}, {"interpolation": CutMix(), "ratio": BetaRatio(per_sample=True)}],
    ids=["similarity", "cutmix"],
)
def test_a_loss_that_cannot_be_weighed_by_rows_is_refused(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"Manifold mixup at layer 'first'.*with one lam per row.*per_sample=False"):
        fit(make_trainer, Scoring(), data(), mixup(layers="first", **settings))


# --- over time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 20}], ids=["epochs", "steps"])
def test_nothing_is_mixed_in_the_last_part(make_trainer: MakeTrainer, limit: dict[str, int]) -> None:
    plans = fit(make_trainer, Network(), data(4), mixup(layers="first", schedule=Until(0.6)), **limit)
    assert [plan.mixes for plan in plans] == [True] * 12 + [False] * 8


def test_steps_of_the_optimizer_count_where_gradients_are_accumulated(make_trainer: MakeTrainer) -> None:
    callback = mixup(layers="first", schedule=Until(0.5))
    limits = {"max_epochs": -1, "max_steps": 4, "accumulate_grad_batches": 2}
    plans = fit(make_trainer, Network(), data(4), callback, **limits)
    assert [plan.mixes for plan in plans] == [True] * 4 + [False] * 4


def test_what_ends_training_first_is_the_end(make_trainer: MakeTrainer) -> None:
    callback = mixup(layers="first", schedule=Until(0.5))
    plans = fit(make_trainer, Network(), data(4), callback, max_epochs=100, max_steps=8)
    assert [plan.mixes for plan in plans] == [True] * 4 + [False] * 4


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from data(4)


def test_data_without_a_length_progress_by_epochs_or_steps(make_trainer: MakeTrainer) -> None:
    loader = DataLoader(Stream(), batch_size=None)
    shares: list[Progress] = []

    def curve(progress: Progress) -> float:
        shares.append(progress)
        return 1.0

    fit(make_trainer, Network(), loader, mixup(layers="first", schedule=curve), max_epochs=2)
    assert [(float(p), p.epoch, p.batch_index) for p in shares] == [
        (epoch / 2, epoch, batch) for epoch in (0, 1) for batch in range(4)
    ]
    plans = fit(make_trainer, Network(), loader, mixup(layers="first", schedule=Until(0.5)), max_epochs=-1, max_steps=8)
    assert [plan.mixes for plan in plans] == [True] * 4 + [False] * 4


def test_a_schedule_without_an_end_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(
        ValueError, match=r"^schedule needs to know how long training is\. Give the Trainer max_epochs or max_steps\.$"
    ):
        fit(make_trainer, Network(), data(), mixup(layers="first", schedule=Until(0.5)), max_epochs=-1)


@resumes
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("middle", [False, True], ids=["epoch", "within_epoch"])
@pytest.mark.parametrize(
    "schedule",
    [Alternating(0.3, 0.7), {"alpha": LinearSchedule(), "first": Until(0.5)}],
    ids=["alternating", "alpha_and_layer"],
)
def test_a_resumed_run_continues_its_schedule(
    make_trainer: MakeTrainer, tmp_path: Any, schedule: Any, middle: bool
) -> None:
    def callback() -> ManifoldMixupCallback:
        return mixup(layers=["input", "first"], schedule=schedule, interpolation=CutMix(), pairing=SameClass())

    def loader() -> DataLoader[Any]:
        return DataLoader(list(data(4)), batch_size=None)

    straight, resumed = Network(), Network()
    steps = {"every_n_train_steps": 10} if middle else {"every_n_epochs": 2}
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **steps)
    mixing = callback()
    plans = Plans(mixing)
    make_trainer(mixing, plans, saving, max_epochs=6, enable_checkpointing=True).fit(straight, loader())
    path = tmp_path / f"step={10 if middle else 8}.ckpt"
    again = callback()
    more = Plans(again)
    make_trainer(again, more, max_epochs=6).fit(resumed, loader(), ckpt_path=path)
    assert [p.lam.tolist() for p in more.used] == [p.lam.tolist() for p in plans.used[-len(more.used) :]]
    if not middle:  # within an epoch this loader begins with its first batch again
        assert all(map(torch.equal, weights_of(resumed), weights_of(straight)))


# --- changed on the way ----------------------------------------------------------------------------------------------


class Changes(pl.Callback):
    """Sets an attribute of the callback at the end of a batch."""

    def __init__(self, callback: ManifoldMixupCallback, at: int, **values: Any) -> None:
        self.callback, self.at, self.values = callback, at, values

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            for name, value in self.values.items():
                setattr(self.callback, name, value)


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": FixedRatio(0.2)},
        {"alpha": 0.3},
        {"schedule": Constant(0.0)},
        {"schedule": {"alpha": Constant(0.1)}},
        {"clean_weight": 0.7},
        {"pairing": Roll()},
        {"pairing": NearestNeighbors()},
        {"probability": 0.5},
        {"seed": 8},
        {"layer_weights": [0.0, 1.0]},
    ],
    ids=lambda change: "_".join(change),
)
def test_settings_changed_during_a_fit_take_effect_from_the_next_batch(
    make_trainer: MakeTrainer, change: dict[str, Any]
) -> None:
    callback, net = mixup(layers=["input", "first"]), Network()
    plans = Plans(callback)
    make_trainer(callback, plans, Changes(callback, 2, **change)).fit(net, data(6))
    settings = {"ratio": BetaRatio(1.0), "pairing": RandomPermutation(), "seed": 5, "clean_weight": 0.0}
    for i, (seen, batch, used) in enumerate(zip(net.seen, data(6), plans.used, strict=True)):
        if i == 3:
            settings |= change
            if "alpha" in settings:
                settings["ratio"] = BetaRatio(settings.pop("alpha"))
            if "layer_weights" in settings:
                settings["weights"] = settings.pop("layer_weights")
        before = Network()
        before.load_state_dict(seen["weights"])
        options = {name: value for name, value in settings.items() if name != "clean_weight"}
        plan = plan_by_hand(before, batch, i, layers=["input", "first"], **options)
        assert used.layer == plan.layer
        if plan.mixes:
            loss, *_ = reference_step(before, batch, plan, reference_linear, settings["clean_weight"])
        else:
            loss = F.cross_entropy(before(batch["x"]), batch["y"]).detach()
        assert_close(seen["loss"], loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [{"interpolation": CutMix()}, {"targets": "y"}, {"ratio": BetaRatio(1.0, per_sample=True)}],
    ids=["interpolation", "targets", "by_row"],
)
def test_settings_that_must_not_change_during_a_fit_are_refused(
    make_trainer: MakeTrainer, change: dict[str, Any]
) -> None:
    callback = mixup(layers=["first"])
    with pytest.raises(RuntimeError, match=r"^layers, per_sample, interpolation, targets, .* must not change during"):
        make_trainer(callback, Changes(callback, 1, **change)).fit(Network(), data())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean_weight": -1}, "clean_weight must be a finite number >= 0, got -1. 0 trains on the mixed batch alone."),
        ({"schedule": 0.5}, "schedule must be a function of the progress of training, or a dict of such functions"),
        ({"ratio": BetaRatio}, "ratio must be a function of a numpy.random.Generator and the number of rows"),
        ({"schedule": {"second": Until()}}, "There is no quantity or eligible layer to schedule 'second'."),
    ],
    ids=["clean_weight", "schedule", "ratio", "layer"],
)
def test_settings_changed_to_what_they_cannot_be_are_refused(
    make_trainer: MakeTrainer, change: dict[str, Any], message: str
) -> None:
    callback = mixup(layers=["first"])
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        make_trainer(callback, Changes(callback, 1, **change)).fit(Network(), data())


# --- off is off, and what lasts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"probability": 0.0},
        {"schedule": Constant(0.0)},
        {"schedule": {"alpha": Constant(0.0)}},
        {"schedule": {"first": Constant(0.0)}},
        {"ratio": FixedRatio(1.0)},
        {"alpha": 0, "interpolation": NoisyFeatures(), "pairing": SameClass()},
    ],
    ids=["probability", "schedule", "alpha", "layer", "ratio", "seeing"],
)
def test_what_is_off_trains_bit_identically_to_no_callback(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    plain, off = Network(), Network()
    fit(make_trainer, plain, data())
    plans = fit(make_trainer, off, data(), mixup(layers="first", clean_weight=0.5, **settings))
    assert not any(plan.mixes for plan in plans)
    assert all(map(torch.equal, weights_of(plain), weights_of(off)))


CALLBACKS = [
    (
        mixup(interpolation=CutMix(), seed=None),
        "ManifoldMixupCallback(alpha=1.0, layers='auto', interpolation=CutMix())",
    ),
    (
        mixup(alpha=0.5, interpolation=TokenMix("mask"), seed=None),
        "ManifoldMixupCallback(alpha=0.5, layers='auto', interpolation=TokenMix(mask='mask'))",
    ),
    (
        mixup(
            ratio=UniformRatio(),
            schedule={"probability": Until()},
            clean_weight=0.5,
            targets="y",
            pairing=SameClass(),
        ),
        "ManifoldMixupCallback(layers='auto', seed=5, pairing=SameClass(), "
        "ratio=UniformRatio(low=0.0, high=1.0, per_sample=False), "
        "schedule={'probability': Until(end=0.8)}, clean_weight=0.5, targets='y')",
    ),
    (
        mixup(ratio=BetaRatio(2.0, beta=1.0), pairing=FromBatch("a")),
        "ManifoldMixupCallback(layers='auto', seed=5, pairing=FromBatch(field='a'), "
        "ratio=BetaRatio(alpha=2.0, per_sample=False, beta=1.0))",
    ),
    (
        mixup(ratio=FoldedRatio(BetaRatio(0.5, True)), interpolation=PatchUp(0.5, 3)),
        "ManifoldMixupCallback(layers='auto', seed=5, ratio=FoldedRatio(ratio=BetaRatio(alpha=0.5, per_sample=True, "
        "beta=None)), interpolation=PatchUp(gamma=0.5, block_size=3))",
    ),
]


@pytest.mark.parametrize(("callback", "shown"), CALLBACKS, ids=["cutmix", "token", "uniform", "beta", "folded"])
def test_repr_is_the_call_that_makes_it_and_copies_are_alike(callback: ManifoldMixupCallback, shown: str) -> None:
    assert repr(callback) == shown
    for twin in (eval(shown), pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert repr(twin) == shown
        assert (twin.ratio, twin.pairing, twin.interpolation) == (
            callback.ratio,
            callback.pairing,
            callback.interpolation,
        )


def test_a_callback_is_copied_in_the_middle_of_a_fit(make_trainer: MakeTrainer) -> None:
    callback = mixup(layers="first", interpolation=CutMix(), pairing=NearestNeighbors())
    copies: list[ManifoldMixupCallback] = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.extend([pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)])

    make_trainer(callback, Copies()).fit(Network(), data())
    nets = [Network(), Network()]
    fit(make_trainer, nets[0], data(), callback)
    fit(make_trainer, nets[1], data(), copies[3])
    assert all(map(torch.equal, weights_of(nets[0]), weights_of(nets[1])))


# --- other loops -----------------------------------------------------------------------------------------------------


class Closing(Network):
    """Whose optimizer evaluates a batch many times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.0, max_iter=4, tolerance_grad=0.0, tolerance_change=-1.0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append({"batch": batch_idx})
        return self.loss(self(batch["x"]), batch)

    def on_before_backward(self, loss: Tensor) -> None:
        self.seen[-1]["loss"] = loss.item()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        return None


@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": CutMix()},
        {"interpolation": PatchUp(0.5, 3)},
        {"interpolation": ChannelMix(), "pairing": NearestNeighbors(2)},
        {"pairing": ConfidentWithUnconfident()},
    ],
    ids=["cutmix", "patchup", "nearest", "confident"],
)
def test_a_batch_is_mixed_alike_however_often_it_is_evaluated(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    net = Closing()
    fit(make_trainer, net, data(4), mixup(layers=["first"], **settings))
    for i in range(4):
        losses = [seen["loss"] for seen in net.seen if seen.get("batch") == i and "loss" in seen]
        assert len(losses) > 1
        assert set(losses) == {losses[0]}


def test_a_loop_of_ones_own_equals_the_formulas() -> None:
    net, batch = Network(), images(6)
    source = PlanSource(["input", "first"], BetaRatio(1.0), NearestNeighbors(), seed=5, interpolation=CutMix())
    mixer = Mixer(resolve_layers(net, ["input", "first"]))
    mixer.attach()
    layers = set()
    for i in range(6):
        mixer.start(source.draw(6, batch_index=i))
        x = mixer.mix_input(batch["x"]) if mixer.mixing.plan.layer == "input" else batch["x"]
        logits = net(x)
        loss = mixed_cross_entropy(logits, batch["y"], mixer.plan)
        mixer.stop()
        grads = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
        plan = source.draw(6, batch_index=i).settled(hidden=hidden_states(net, batch["x"])[str(mixer.plan.layer)])
        wanted, wanted_grads, weights = reference_step(net, batch, plan, reference_cutmix)
        assert_weights(mixer.plan.lam, weights)
        assert_close(loss.detach(), wanted, rtol=0, atol=1e-13)
        for got, other in zip(grads, wanted_grads, strict=True):
            assert got is other is None or (got - other).abs().max() < 1e-13
        layers.add(plan.layer)
    mixer.detach()
    assert layers == {"input", "first"}


def test_functions_equal_the_formulas() -> None:
    net, batch = Network(), images(6)
    plan = PlanSource(["first"], BetaRatio(1.0), SameClass(), interpolation=CutMix()).draw(6, targets=batch["y"])
    hidden, used = interpolate(net.first(batch["x"]), plan)
    logits = net.head(torch.tanh(net.hidden(torch.tanh(net.second(torch.tanh(hidden))).mean(dim=(2, 3)))))
    wanted, _, weights = reference_step(net, batch, plan, reference_cutmix)
    assert_weights(used.lam, weights)
    assert_close(mixed_cross_entropy(logits, batch["y"], used).detach(), wanted, rtol=0, atol=1e-13)


class Pooling(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.tanh().mean(dim=(2, 3))


def test_mix_points_of_a_module_of_blocks_are_mixed_in_every_way(make_trainer: MakeTrainer) -> None:
    def module(*eligible: bool) -> MixableModule:
        net = Network()
        blocks = [net.first, nn.Tanh(), net.second, Pooling(), net.hidden, nn.Tanh(), net.head]
        return MixableModule(list(zip(blocks, eligible, strict=True)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

    blocks = module(True, True, False, False, False, False, False).double()
    batches = Batches((batch["x"], batch["y"]) for batch in data(5))
    fit(make_trainer, blocks, batches, mixup(interpolation=CutMix()))
    net = Network()
    fit(make_trainer, net, data(5), mixup(layers=["input", "first"], interpolation=CutMix()))
    for got, wanted in ((blocks.blocks[0], net.first), (blocks.blocks[-1], net.head)):
        assert_close(weights_of(got), weights_of(wanted), rtol=0, atol=1e-13)
    partly, callback = module(True, False, False, False, True, False, False).double(), mixup(interpolation=CutMix())
    plans = fit(make_trainer, partly, batches, callback)
    assert [plan.layer for plan in plans] == ["input"] * len(plans)  # vectors are passed over
    assert callback.layer_names == ("input",)
    with pytest.raises(ValueError, match=r"^Layer 'mix_before\.4' cannot be mixed: CutMix\(\) does not fit: it cuts"):
        fit(
            make_trainer,
            module(False, False, False, False, True, False, False).double(),
            batches,
            mixup(interpolation=CutMix()),
        )


class Checkpointing(Network):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        def begin(x: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

        pooled = checkpoint(begin, x, use_reentrant=False).mean(dim=(2, 3))
        return self.head(torch.tanh(self.hidden(pooled)))


@pytest.mark.parametrize(
    "settings",
    [
        {"pairing": NearestNeighbors(2)},
        {"interpolation": PatchUp(0.5, 3)},
        {"interpolation": NoisyFeatures()},
        {"ratio": SimilarityRatio(), "clean_weight": 0.5},
    ],
    ids=["nearest", "patchup", "noisy", "similarity"],
)
def test_activation_checkpointing_repeats_every_mix(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    nets = [Network(), Checkpointing()]
    for net in nets:
        fit(make_trainer, net, data(), mixup(layers=["first", "second"], **settings))
    for one, other in zip(weights_of(nets[0]), weights_of(nets[1]), strict=True):
        assert_close(one, other, rtol=0, atol=1e-13)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": CutMix(), "clean_weight": 0.5},
        {"interpolation": PatchUp(0.5, 3)},
        {"interpolation": NoisyFeatures()},
        {"interpolation": ChannelMix(), "pairing": NearestNeighbors()},
        {"ratio": SimilarityRatio()},
        {"pairing": ConfidentWithUnconfident()},
    ],
    ids=["cutmix", "patchup", "noisy", "channels_nearest", "similarity", "confident"],
)
@pytest.mark.slow
def test_compiled_equals_eager(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    nets = [Network(), Network()]
    nets[1].compile(backend="aot_eager")
    for net in nets:
        fit(make_trainer, net, data(), mixup(layers=["input", "first"], **settings))
    for one, other in zip(weights_of(nets[0]), weights_of(nets[1]), strict=True):
        assert_close(one, other, rtol=0, atol=1e-13)


# --- refused by name -------------------------------------------------------------------------------------------------


def third_row(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return (hidden + hidden[plan.partner] + hidden.roll(1, 0)) / 3, plan.lam


def reversed_weight(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    lam = plan.lam.to(hidden.dtype).view(-1, *[1] * (hidden.dim() - 1))
    return lam * hidden + (1 - lam) * hidden[plan.partner], 1 - plan.lam


def only_own(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return hidden, plan.lam


def only_partners(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return hidden[plan.partner], plan.lam


def swapped(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return linear(hidden[plan.partner], hidden, plan.lam.to(hidden.dtype)), plan.lam


def no_pair(hidden: Tensor, plan: MixPlan) -> Tensor:
    return hidden


def a_number(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, float]:
    return hidden, 0.5


def another_type(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return hidden.half(), plan.lam


def anew(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return hidden + torch.rand(1, dtype=hidden.dtype), plan.lam


def by_row(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return hidden, torch.linspace(0, 1, len(hidden))


def too_large(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    return hidden, plan.lam + 1


@pytest.mark.parametrize(
    ("interpolation", "layer", "message"),
    [
        (
            CutMix(),
            "hidden",
            "CutMix() does not fit: it cuts boxes out of (N, C, H, W) or (N, C, D, H, W), and this is",
        ),
        (PatchUp(), "hidden", "PatchUp(gamma=0.5, block_size=7) does not fit: it mixes blocks of feature maps"),
        (
            TokenMix(),
            "first",
            "TokenMix(mask=None) does not fit: it exchanges tokens of (N, T, D), and this is of shape",
        ),
        (third_row, "first", f"{third_row!r} does not fit: it makes a row of other rows than the row itself and its"),
        (
            reversed_weight,
            "first",
            f"{reversed_weight!r} does not fit: it returns the own rows, but 0 as weight of the",
        ),
        (only_own, "first", f"{only_own!r} does not fit: it returns the own rows, but 0.5 as weight of the row itself"),
        (
            only_partners,
            "first",
            f"{only_partners!r} does not fit: it returns the partners' rows, but 1 as weight of the row itself",
        ),
        (swapped, "first", f"{swapped!r} does not fit: it returns the partners' rows, but 1 as weight of the row"),
        (no_pair, "first", f"{no_pair!r} does not fit: it must return two tensors, mixed rows and the weight of the"),
        (a_number, "first", f"{a_number!r} does not fit: it must return two tensors, mixed rows and the weight of the"),
        (another_type, "first", f"{another_type!r} does not fit: it must return rows as it gets them, torch.float"),
        (anew, "first", f"{anew!r} does not fit: it draws anew whenever it is called; draw with mm_lightning.mixup.un"),
        (by_row, "first", f"{by_row!r} does not fit: it gives each row a weight of its own, which it must say by an"),
        (
            too_large,
            "first",
            f"{too_large!r} does not fit: it must return the weight of the row itself, in [0, 1], (6,)",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_ways_that_do_not_fit_a_layer_are_refused(
    make_trainer: MakeTrainer, interpolation: Any, layer: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^Layer {layer!r} cannot be mixed: {re.escape(message)}"):
        fit(make_trainer, Network(), data(), mixup(layers=layer, interpolation=interpolation))


SEEING = [
    {"pairing": SameClass()},
    {"pairing": ConfidentWithUnconfident()},
    {"pairing": NearestNeighbors()},
    {"pairing": FromBatch("p")},
    {"ratio": SimilarityRatio()},
    {"interpolation": CutMix()},
]


@pytest.mark.parametrize("settings", SEEING, ids=lambda settings: str(*settings.values()))
def test_the_logged_lam_is_that_of_the_loss(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    class Logged(pl.Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.values.append(float(trainer.callback_metrics["mixup/lam"]))

    callback, logged = mixup(layers="first", **settings), Logged()
    plans = Plans(callback)
    logger = CSVLogger(make_trainer().default_root_dir)
    batches = Batches({**batch, "p": torch.arange(6).flip(0)} for batch in data())
    make_trainer(callback, plans, logged, logger=logger, log_every_n_steps=1).fit(Network(), batches)
    assert len(logged.values) == 4
    assert logged.values == pytest.approx([float(plan.lam.double().mean()) for plan in plans.used], abs=1e-6)
    assert all(0 < value < 1 for value in logged.values)


class Counting(Network):
    """Which counts in a buffer, and in a metric, in batches of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.metric = MeanMetric()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if "z" in batch or batch_idx == 3:
            self.count += 1
            self.metric.update(1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("settings", [{"clean_weight": 1.0}, {"pairing": ConfidentWithUnconfident()}], ids=["w", "p"])
def test_what_the_unmixed_run_changes_is_put_back_in_every_batch(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    net = Counting()
    batches = Batches({**batch, **({"z": batch["y"]} if i % 2 == 0 else {})} for i, batch in enumerate(data(6)))
    fit(make_trainer, net, batches, mixup(layers="first", **settings))
    assert float(net.count) == 4
    assert float(net.metric.weight) == 4


def test_layers_that_are_named_beside_auto_are_not_passed_over(make_trainer: MakeTrainer) -> None:
    net = Network()
    blocks = [net.first, nn.Tanh(), net.second, Pooling(), net.hidden, nn.Tanh(), net.head]
    eligible = [True, True, False, False, False, False, False]
    module = MixableModule(list(zip(blocks, eligible, strict=True))).double()
    batches = Batches((batch["x"], batch["y"]) for batch in data(2))
    with pytest.raises(ValueError, match=r"^Layer 'blocks\.4' cannot be mixed: CutMix\(\) does not fit"):
        fit(make_trainer, module, batches, mixup(layers=["auto", "blocks.4"], interpolation=CutMix()))


def test_a_ratio_of_ones_own_is_tried_once_and_no_more(make_trainer: MakeTrainer) -> None:
    calls: list[int] = []

    def half(rng: np.random.Generator, rows: int) -> list[float]:
        calls.append(rows)
        return [0.5]

    fit(make_trainer, Network(), data(5), mixup(layers="first", ratio=half))
    assert [rows for rows in calls if rows != 6] == [3]


def test_a_way_that_asks_for_what_nothing_hands_over_is_refused() -> None:
    def pairing(rng: np.random.Generator, rows: int, epoch: int) -> np.ndarray:
        return rng.permutation(rows)

    with pytest.raises(TypeError, match=r"^pairing asks for 'epoch', which nothing hands over, got <function"):
        mixup(pairing=pairing)
    with pytest.raises(TypeError, match=r"^ratio asks for 'epoch', which nothing hands over, got <function"):
        mixup(ratio=pairing)


def test_a_way_does_not_keep_a_network_alive() -> None:
    class Pairs(nn.Module):
        def pair(self, rng: np.random.Generator, rows: int, targets: Tensor) -> np.ndarray:
            return rng.permutation(rows)

    net = Pairs()
    callback, gone = mixup(pairing=net.pair), weakref.ref(net)
    PlanSource(["a"], pairing=net.pair).draw(4)
    del net, callback
    gc.collect()
    assert gone() is None


class Recurrent(Network):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True).double()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.lstm(x)[0].mean(dim=1))))


def test_layers_of_many_tensors_are_mixed_linearly_alone(make_trainer: MakeTrainer) -> None:
    batches = Batches(sequences(6, seed, masked=False) for seed in range(3))
    fit(make_trainer, Recurrent(), batches, mixup(layers="lstm", pairing=NearestNeighbors()))
    with pytest.raises(
        ValueError, match=r"^Layer 'lstm' cannot be mixed: TokenMix\(mask=None\) mixes one tensor, and there are 3\."
    ):
        fit(make_trainer, Recurrent(), batches, mixup(layers="lstm", interpolation=TokenMix()))


def test_auto_is_where_the_interpolation_fits(make_trainer: MakeTrainer) -> None:
    callback = mixup(interpolation=CutMix())
    net = nn.Sequential(nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    class Flat(Network):
        def __init__(self) -> None:
            super().__init__()
            self.net = net.double()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.net(x.flatten(1))

    fit(make_trainer, Flat(), data(), callback)
    assert callback.layer_names == ("input",)
    callback = mixup(interpolation=CutMix())
    fit(make_trainer, Network(), data(), callback)
    assert set(callback.layer_names) <= {"input", "first", "second"}
    assert len(callback.layer_names) > 1
    with pytest.raises(ValueError, match="found no layer of Network that everything runs through"):
        fit(
            make_trainer,
            Network(),
            Batches(sequences(6, masked=False) for _ in range(2)),
            mixup(interpolation=PatchUp()),
        )


def test_an_interpolation_that_asks_for_what_it_is_not_handed_is_refused() -> None:
    def asking(hidden: Tensor, plan: MixPlan, targets: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, plan.lam

    with pytest.raises(TypeError) as refusal:
        mixup(layers="first", interpolation=asking)
    assert str(refusal.value) == (
        f"interpolation may ask for the batch alone, but {asking!r} asks for targets. Take it from the batch, by a "
        "third parameter called batch."
    )


def half_way(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
    """Mixes half as much as planned. Its weights are alike in all rows, and no expanded number."""
    lam = 1 - (1 - plan.lam) / 2
    weight = lam.to(hidden.dtype).view(-1, *[1] * (hidden.dim() - 1))
    return weight * hidden + (1 - weight) * hidden[plan.partner], lam


def reference_half_way(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, list[float]]:
    lams = [1 - (1 - lam) / 2 for lam in plan.lam.tolist()]
    rows = [lam * hidden[i] + (1 - lam) * hidden[j] for i, (lam, j) in enumerate(zip(lams, plan.partner, strict=True))]
    return torch.stack(rows), lams


def test_a_function_of_ones_own_is_a_way(make_trainer: MakeTrainer) -> None:
    net, callback = Network(), mixup(layers=["input", "first"], ratio=FixedRatio(0.25), interpolation=half_way)
    for i, plan in enumerate(fit(make_trainer, net, data(), callback)):
        before, batch = Network(), data()[i]
        before.load_state_dict(net.seen[i]["weights"])
        wanted, _, weights = reference_step(before, batch, plan_of(plan, 0.25), reference_half_way)
        assert_weights(plan.lam, weights)
        assert_close(net.seen[i]["loss"], wanted, rtol=0, atol=1e-12)


def plan_of(used: MixPlan, lam: float) -> MixPlan:
    return MixPlan(used.layer, used.partner, torch.full((len(used.partner),), lam))


def test_weights_that_turn_out_to_differ_are_refused() -> None:
    def sometimes(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        return hidden, by_row(hidden, plan)[1]

    with pytest.raises(RuntimeError, match=r"gives each row a weight of its own, which it must say: give it an attrib"):
        interpolate(torch.zeros(4, 3), PlanSource(["a"], interpolation=sometimes).draw(4))


class Segmenting(Network):
    """Classes of pixels, (N, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(4, 3, 1, dtype=torch.float64)
        self.out.weight.data = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4, 1, 1)

    def scores(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append({})
        return F.cross_entropy(self.scores(batch["x"]), batch["map"])


def test_losses_of_maps_are_interpolated_and_maps_not_cut(make_trainer: MakeTrainer) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = Batches(
        {"x": batch["x"], "map": torch.randint(0, 3, (6, 6, 8), generator=generator)} for batch in data(3)
    )
    net = Segmenting()
    fit(make_trainer, net, batches, mixup(layers="input", interpolation=CutMix()))
    for i, (seen, batch) in enumerate(zip(net.seen, batches, strict=True)):
        before = Segmenting()
        before.load_state_dict(seen["weights"])
        plan = PlanSource(["input"], BetaRatio(1.0), seed=5, interpolation=CutMix()).draw(6, batch_index=i)
        mixed, (lam, *_) = reference_cutmix(batch["x"], plan)
        scores = before.scores(mixed)
        own, other = (F.cross_entropy(scores, maps) for maps in (batch["map"], batch["map"][plan.partner]))
        assert_close(seen["loss"], (lam * own + (1 - lam) * other).detach(), rtol=0, atol=1e-12)


class Attending(Network):
    """A transformer encoder of padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, dtype=torch.float64)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return self.head(self.hidden(self.pool(self.encoder(self.embed(x), src_key_padding_mask=~mask), mask)))


@pytest.mark.parametrize(
    "settings",
    [{"interpolation": TokenMix("mask")}, {"interpolation": TokenMix()}, {"ratio": BetaRatio(per_sample=True)}],
    ids=["real_tokens", "tokens", "by_row"],
)
def test_masked_transformers_are_mixed_at_layers_found(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    callback = mixup(**settings)
    plans = fit(make_trainer, Attending(), Batches(sequences(6, seed) for seed in range(6)), callback)
    assert callback.layer_names == ("input", "encoder.layers.0", "encoder.layers.1")
    assert len({plan.layer for plan in plans}) > 1


@pytest.mark.filterwarnings("ignore:A batch of one row has no partner")
@pytest.mark.parametrize("rows", [[2, 2, 2], [3, 3, 1], [6, 1, 5]], ids=["two", "odd", "last"])
def test_batches_of_few_rows_are_mixed_and_of_one_are_not(make_trainer: MakeTrainer, rows: list[int]) -> None:
    settings = {"interpolation": CutMix(), "pairing": NearestNeighbors(2), "clean_weight": 0.5}
    batches = Batches(images(n, seed) for seed, n in enumerate(rows))
    plans = fit(make_trainer, Network(), batches, mixup(layers="first", **settings))
    assert [(plan.mixes, plan.batch_size) for plan in plans] == [(n > 1, n) for n in rows]


@pytest.mark.parametrize("pairing", [SameClass()], ids=["same_class"])
def test_numbers_are_no_classes(make_trainer: MakeTrainer, pairing: Any) -> None:
    with pytest.raises(ValueError, match=r"^SameClass\(\) needs classes as targets.*use LabelDistance\(bandwidth\)\.$"):
        fit(
            make_trainer,
            Network(),
            Batches(images(numbers=True) for _ in range(2)),
            mixup(layers="first", pairing=pairing),
        )
