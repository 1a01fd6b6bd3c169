"""ManifoldMixupCallback on LightningModules that know nothing of it."""

from __future__ import annotations

import copy
import csv
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from versions import answers, compiles

from mm_lightning import BetaRatio, ManifoldMixupCallback, MixPlan, MixPoint, Roll

MakeTrainer = Callable[..., pl.Trainer]
LAYERS = ["input", "first", "second"]


class Classifier(pl.LightningModule):
    """4-8-8-3 with tanh, float64; the style of module that people have."""

    def __init__(self, loss: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.loss = loss or nn.CrossEntropyLoss()
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.seen.append({"loss": loss.detach().clone()})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen[-1]["grads"] = [parameter.grad.clone() for parameter in self.parameters()]
        self.seen[-1]["weights"] = [parameter.detach().clone() for parameter in self.parameters()]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches(list[Any]):
    """A plain loader. (A list of batches would be taken for a list of loaders.)"""


class Plans(pl.Callback):
    """Keeps the plan of every batch."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback = callback
        self.plans: list[MixPlan] = []

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.callback.plan is not None
        self.plans.append(self.callback.plan)


def rows(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def loader(n: int = 40, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(n)), batch_size=batch_size)


def _reference_step(weights: list[Tensor], x: Tensor, y: Tensor, plan: MixPlan) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the paper's step, by explicit formulas."""
    w1, b1, w2, b2, w3, b3 = leaves = [weight.clone().requires_grad_() for weight in weights]
    lam = torch.tensor([float(value) for value in plan.lam], dtype=torch.float64)
    partner = plan.partner.tolist()

    def maybe_mix(hidden: Tensor, layer: str) -> Tensor:
        if plan.layer != layer:
            return hidden
        return torch.stack([lam[i] * hidden[i] + (1 - lam[i]) * hidden[partner[i]] for i in range(len(hidden))])

    hidden = maybe_mix(x, "input")
    hidden = maybe_mix(hidden @ w1.T + b1, "first")
    hidden = maybe_mix(torch.tanh(hidden) @ w2.T + b2, "second")
    logits = torch.tanh(hidden) @ w3.T + b3
    log_probs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    loss = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(y.tolist()):
        loss = loss - lam[i] * log_probs[i, own] - (1 - lam[i]) * log_probs[i, y[partner[i]]]
    loss = loss / len(y)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), F.cross_entropy, imported_by_name], ids=["module", "function", "imported-by-name"]
)
def test_every_step_equals_the_formulas(
    make_trainer: MakeTrainer, loss: Callable[..., Tensor], per_sample: bool
) -> None:
    model, callback = (
        Classifier(loss),
        ManifoldMixupCallback(alpha=1.0, layers=LAYERS, per_sample=per_sample, seed=5, schedule=None),
    )
    plans = Plans(callback)
    make_trainer(callback, plans, max_epochs=3).fit(model, loader())

    assert {plan.layer for plan in plans.plans} == set(LAYERS)  # every layer was drawn, so every layer is checked
    x, y = rows()
    for step, (seen, plan) in enumerate(zip(model.seen, plans.plans, strict=True)):
        batch = slice(step % 5 * 8, step % 5 * 8 + 8)
        loss_value, grads = _reference_step(seen["weights"], x[batch], y[batch], plan)
        torch.testing.assert_close(seen["loss"], loss_value, rtol=0, atol=1e-12)
        for got, wanted in zip(seen["grads"], grads, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_alpha_zero_trains_bit_identically_to_no_callback(make_trainer: MakeTrainer) -> None:
    plain, off = Classifier(), Classifier()
    make_trainer(max_epochs=2).fit(plain, loader())
    make_trainer(ManifoldMixupCallback(alpha=0, layers=LAYERS), max_epochs=2).fit(off, loader())
    for wanted, got in zip(plain.parameters(), off.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_probability_is_the_share_of_mixed_batches(make_trainer: MakeTrainer) -> None:
    callback = ManifoldMixupCallback(layers="first", probability=0.5, schedule=None)
    plans = Plans(callback)
    make_trainer(callback, plans, max_epochs=80).fit(Classifier(), loader())
    share = sum(plan.mixes for plan in plans.plans) / len(plans.plans)
    assert abs(share - 0.5) < 4 * (0.25 / 400) ** 0.5


def test_validation_test_and_predict_are_unmixed(make_trainer: MakeTrainer) -> None:
    model = Classifier()
    trainer = make_trainer(ManifoldMixupCallback(layers=LAYERS), max_epochs=2)
    trainer.fit(model, loader(), loader())
    x, y = rows()
    with torch.no_grad():
        wanted = F.cross_entropy(model(x), y)
    torch.testing.assert_close(trainer.callback_metrics["val"], wanted, rtol=0, atol=1e-6)  # logged as float32
    assert torch.equal(torch.cat(trainer.predict(model, DataLoader(x, batch_size=8))), model(x))


def test_a_validation_step_that_calls_training_step_is_unmixed(make_trainer: MakeTrainer) -> None:
    class Lazy(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            assert torch.equal(self.training_step(batch, batch_idx), F.cross_entropy(self(x), y))

    make_trainer(ManifoldMixupCallback(layers=LAYERS)).fit(Lazy(), loader(), loader())


def test_everything_is_put_back_after_fit(make_trainer: MakeTrainer) -> None:
    model = Classifier()
    keys, step = list(model.state_dict()), model.training_step.__func__
    make_trainer(ManifoldMixupCallback(layers=LAYERS)).fit(model, loader())
    _assert_untouched(model, keys, step)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training_step", "on_train_batch_end", "validation_step"])
def test_everything_is_put_back_after_a_failure(
    make_trainer: MakeTrainer, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Classifier):
        pass

    def fail(self: Any, *args: Any) -> None:
        raise error("broken")

    monkeypatch.setattr(Failing, where, fail)
    model = Failing()
    keys, step = list(model.state_dict()), model.training_step.__func__
    with answers(error):
        make_trainer(ManifoldMixupCallback(layers=LAYERS)).fit(model, loader(), loader())
    _assert_untouched(model, keys, step)


def _assert_untouched(model: nn.Module, keys: list[str], step: Any) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "training_step" not in model.__dict__
    assert model.training_step.__func__ is step
    assert list(model.state_dict()) == keys


def test_the_batch_is_not_changed_and_metrics_see_own_targets(make_trainer: MakeTrainer) -> None:
    class Watching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            with torch.no_grad():
                logits = self.head(x.repeat(1, 2))  # a metric's forward pass, past the mixed layers
            assert y.dtype == torch.int64
            self.hits = int((logits.argmax(dim=1) == y).sum())
            self.predicted = logits.argmax(dim=1).tolist()
            return super().training_step(batch, batch_idx)

    class Unchanged(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            x, y = rows()
            assert torch.equal(batch[0], x[batch_idx * 8 : batch_idx * 8 + 8])
            assert torch.equal(batch[1], y[batch_idx * 8 : batch_idx * 8 + 8])
            assert type(batch[1]) is Tensor
            wanted = y[batch_idx * 8 : batch_idx * 8 + 8].tolist()
            assert module.hits == sum(int(a == b) for a, b in zip(module.predicted, wanted, strict=True))

    make_trainer(ManifoldMixupCallback(layers="input"), Unchanged()).fit(Watching(), loader())


def test_no_global_random_state_is_read_or_moved(make_trainer: MakeTrainer) -> None:
    def states() -> tuple[Any, ...]:
        import random

        import numpy as np

        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global state is what must not move
        return random.getstate(), legacy, torch.get_rng_state().tolist()

    losses = []
    for seed in (1, 2):
        pl.seed_everything(seed)
        before = states()
        model = Classifier()
        callback = ManifoldMixupCallback(layers=LAYERS, seed=3)
        trainer = make_trainer(callback)
        # Not DataLoader: it draws a seed from the global generator at every epoch.
        batches = Batches(zip(rows()[0].split(8), rows()[1].split(8), strict=True))
        model_init = copy.deepcopy(model)  # Linear's own initialisation moves the state; do not count it
        before = states()
        trainer.fit(model_init, batches)
        assert states() == before
        losses.append([seen["loss"] for seen in model_init.seen])
    assert losses[0] == losses[1]


def test_a_resumed_run_continues_the_sequence(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    straight, first, second = Classifier(), Classifier(), Classifier()
    make_trainer(ManifoldMixupCallback(layers=LAYERS, seed=9, schedule=None), max_epochs=4).fit(straight, loader())
    trainer = make_trainer(ManifoldMixupCallback(layers=LAYERS, seed=9, schedule=None), max_epochs=2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(ManifoldMixupCallback(layers=LAYERS, seed=9, schedule=None), max_epochs=4).fit(
        second, loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    for wanted, got in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_resuming_with_other_settings_says_so(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    trainer = make_trainer(ManifoldMixupCallback(alpha=1.0, layers=LAYERS, seed=1))
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = ManifoldMixupCallback(alpha=0.5, layers="first", seed=2)
    with pytest.warns(
        UserWarning, match=r"alpha=0\.5 \(was 1\.0\), seed=2 \(was 1\), layers=\['first'\] \(was \['input'"
    ):
        make_trainer(other, max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_resuming_with_the_same_settings_is_silent(
    make_trainer: MakeTrainer, tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    for epochs, path in ((1, None), (2, tmp_path / "a.ckpt")):
        trainer = make_trainer(ManifoldMixupCallback(alpha=1.0, layers=LAYERS, seed=1), max_epochs=epochs)
        trainer.fit(Classifier(), loader(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not [str(warning.message) for warning in recwarn if "Manifold mixup" in str(warning.message)]


def _reversed(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    return np.arange(batch_size)[::-1]


class Reversed:
    def __call__(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        return _reversed(rng, batch_size)


@pytest.mark.parametrize(
    ("make", "saved"),
    [
        (lambda: lambda rng, n: _reversed(rng, n), "<lambda>"),
        (Reversed, f"<{__name__}.Reversed object>"),
    ],
    ids=["function", "object"],
)
def test_resuming_with_the_same_pairing_of_ones_own_is_silent(
    make_trainer: MakeTrainer, tmp_path: Any, recwarn: pytest.WarningsRecorder, make: Any, saved: str
) -> None:
    pairings = [make(), make()]  # of the first and of the second process
    for pairing, epochs, path in zip(pairings, (1, 2), (None, tmp_path / "a.ckpt"), strict=True):
        trainer = make_trainer(ManifoldMixupCallback(layers=LAYERS, seed=1, pairing=pairing), max_epochs=epochs)
        trainer.fit(Classifier(), loader(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["mm_lightning"]["pairing"] == saved
    assert not [str(warning.message) for warning in recwarn if "Manifold mixup" in str(warning.message)]


def test_seed_everything_gives_the_default_seed(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers_and_lams(seed: int | None) -> list[tuple[str | None, float]]:
        callback = ManifoldMixupCallback(layers=LAYERS, seed=seed)
        plans = Plans(callback)
        make_trainer(callback, plans).fit(Classifier(), loader())
        return [(plan.layer, float(plan.lam[0])) for plan in plans.plans]

    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert layers_and_lams(None) == layers_and_lams(7) != layers_and_lams(8)


def test_a_batch_of_one_trains_unmixed_and_warns_once(make_trainer: MakeTrainer) -> None:
    plain, mixed = Classifier(), Classifier()
    make_trainer().fit(plain, loader(batch_size=1))
    with pytest.warns(UserWarning, match="one row has no partner") as caught:
        make_trainer(ManifoldMixupCallback(layers=LAYERS)).fit(mixed, loader(batch_size=1))
    assert len([w for w in caught if "one row" in str(w.message)]) == 1
    for wanted, got in zip(plain.parameters(), mixed.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_an_odd_last_batch_is_mixed(make_trainer: MakeTrainer) -> None:
    callback = ManifoldMixupCallback(layers=LAYERS, pairing=Roll())
    plans = Plans(callback)
    make_trainer(callback, plans).fit(Classifier(), loader(n=11, batch_size=8))
    assert [plan.batch_size for plan in plans.plans] == [8, 3]
    assert plans.plans[1].mixes


def test_layer_and_lam_are_logged(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    from lightning.pytorch.loggers import CSVLogger

    callback = ManifoldMixupCallback(layers=LAYERS, schedule=None)
    plans, logger = Plans(callback), CSVLogger(tmp_path)
    make_trainer(callback, plans, logger=logger, log_every_n_steps=1).fit(Classifier(), loader())
    with open(logger.experiment.metrics_file_path, newline="") as file:
        logged = list(csv.DictReader(file))
    assert [float(row["mixup/layer"]) for row in logged] == [LAYERS.index(str(plan.layer)) for plan in plans.plans]
    assert [float(row["mixup/lam"]) for row in logged] == pytest.approx([float(plan.lam[0]) for plan in plans.plans])


def test_mix_points_are_what_auto_means(make_trainer: MakeTrainer) -> None:
    class WithPoints(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.other = MixPoint(), MixPoint()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.other(torch.tanh(self.second(self.point(torch.tanh(self.first(x)))))))

    callback = ManifoldMixupCallback()
    make_trainer(callback).fit(WithPoints(), loader())
    assert callback.layer_names == ("point", "other")


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_the_mix(make_trainer: MakeTrainer, reentrant: bool) -> None:
    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            def body(x: Tensor) -> Tensor:
                return torch.tanh(self.second(torch.tanh(self.first(x))))

            return self.head(checkpoint(body, x.clone().requires_grad_(), use_reentrant=reentrant))

    plain, saving = Classifier(), Checkpointed()
    for model in (plain, saving):
        make_trainer(ManifoldMixupCallback(layers=LAYERS), max_epochs=2).fit(model, loader())
    for wanted, got in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_manual_optimization_equals_automatic(make_trainer: MakeTrainer) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    automatic, manual = Classifier(), Manual()
    for model in (automatic, manual):
        make_trainer(ManifoldMixupCallback(layers=LAYERS), max_epochs=2).fit(model, loader())
    for wanted, got in zip(automatic.parameters(), manual.parameters(), strict=True):
        assert torch.equal(wanted, got)


@compiles
@pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
@pytest.mark.parametrize("what", ["net", "module", "in place"])
def test_compiled_equals_eager(make_trainer: MakeTrainer, what: str) -> None:
    torch._dynamo.reset()
    eager, compiled = Classifier(), Classifier()
    compiled.on_before_optimizer_step = lambda optimizer: None  # type: ignore[method-assign]
    for model in (eager, compiled):
        model.first.float(), model.second.float(), model.head.float()
    fitted: nn.Module = compiled
    if what == "net":
        compiled.second = torch.compile(compiled.second, backend="aot_eager", fullgraph=True)
    elif what == "in place":
        compiled.second.compile(backend="aot_eager", fullgraph=True)
    else:
        fitted = torch.compile(compiled, backend="aot_eager")
    x, y = rows()
    data = DataLoader(TensorDataset(x.float(), y), batch_size=8)
    for model in (eager, fitted):
        make_trainer(ManifoldMixupCallback(layers=LAYERS), max_epochs=2).fit(model, data)
    for wanted, got in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_hidden_states_keep_their_dtype(make_trainer: MakeTrainer, precision: Any) -> None:
    dtypes = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-true": torch.float16}

    class Watching(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            assert hidden.dtype == dtypes[precision]
            return self.head(torch.tanh(self.second(torch.tanh(hidden))))

    x, y = rows()
    model = Watching().float()
    make_trainer(ManifoldMixupCallback(layers="first"), precision=precision).fit(
        model, DataLoader(TensorDataset(x.float(), y), batch_size=8)
    )
    assert len(model.seen) == 5
    assert all(seen["loss"].isfinite() for seen in model.seen)


def test_the_learning_rate_finder_runs_and_leaves_nothing(make_trainer: MakeTrainer) -> None:
    from lightning.pytorch.tuner import Tuner

    model = Classifier()
    model.lr = 0.1  # type: ignore[assignment]
    keys, step = list(model.state_dict()), model.training_step.__func__
    Tuner(make_trainer(ManifoldMixupCallback(layers=LAYERS))).lr_find(model, loader(400), num_training=5)
    _assert_untouched(model, keys, step)


def test_by_default_the_last_fifth_of_training_is_unmixed(make_trainer: MakeTrainer) -> None:
    callback = ManifoldMixupCallback(layers=LAYERS)
    plans = Plans(callback)
    make_trainer(callback, plans, max_epochs=2).fit(Classifier(), loader())  # five batches an epoch
    assert [plan.mixes for plan in plans.plans] == [True] * 8 + [False] * 2


def test_by_default_training_without_an_end_is_mixed_throughout_which_is_said(make_trainer: MakeTrainer) -> None:
    callback = ManifoldMixupCallback(layers=LAYERS)
    plans = Plans(callback)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    with pytest.warns(UserWarning, match="^All batches are mixed: to leave the last fifth of training unmixed"):
        make_trainer(callback, plans, Stop(), max_epochs=-1).fit(Classifier(), loader())
    assert all(plan.mixes for plan in plans.plans)
    assert len(plans.plans) == 15


def test_fit_twice_mixes_twice(make_trainer: MakeTrainer) -> None:
    once, twice = Classifier(), Classifier()
    make_trainer(ManifoldMixupCallback(layers=LAYERS, schedule=None), max_epochs=2).fit(once, loader())
    callback = ManifoldMixupCallback(layers=LAYERS, schedule=None)
    trainer = make_trainer(callback)
    trainer.fit(twice, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, loader())
    for wanted, got in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(wanted, got)


FUNCTION = "a function of a numpy.random.Generator and the number of rows"
LAYER_KINDS = "'auto', 'input', module names, module classes, module objects or a list of these"
LAYERS_HINT = "mm_lightning.inspect(module, batch) lists the names."
LOSS_KINDS = "an attribute's name, a loss module, a function or a list of these"
LOSS_HINT = "None mixes what training_step returns."
ONE_EACH = "one number for each of the eligible layers"
DIMENSIONS = "a dimension >= 0 or a dict of layers' names to dimensions >= 0"

REFUSED = [
    ("alpha", "1", TypeError, "a finite number >= 0, got '1' of type str. 0 switches mixing off."),
    ("alpha", True, TypeError, "a finite number >= 0, got True of type bool. 0 switches mixing off."),
    ("alpha", math.nan, ValueError, "a finite number >= 0, got nan. 0 switches mixing off."),
    ("alpha", math.inf, ValueError, "a finite number >= 0, got inf. 0 switches mixing off."),
    ("per_sample", "yes", TypeError, "True or False, got 'yes' of type str. False draws one lam for the batch."),
    ("probability", "1", TypeError, "a number in [0, 1], got '1' of type str. 0 switches mixing off."),
    ("probability", True, TypeError, "a number in [0, 1], got True of type bool. 0 switches mixing off."),
    ("probability", False, TypeError, "a number in [0, 1], got False of type bool. 0 switches mixing off."),
    ("probability", 1.5, ValueError, "a number in [0, 1], got 1.5. 0 switches mixing off."),
    ("seed", 1.5, TypeError, "an integer in [0, 2**64), got 1.5 of type float. Give 0, for example."),
    ("seed", -1, ValueError, "an integer in [0, 2**64), got -1. Give 0, for example."),
    ("pairing", "roll", TypeError, f"{FUNCTION}, got 'roll' of type str. Give RandomPermutation() or Roll()."),
    ("pairing", Roll, TypeError, f"{FUNCTION}, got {Roll!r} of type type. Give RandomPermutation() or Roll()."),
    ("layer_weights", "abc", TypeError, f"{ONE_EACH}, got 'abc' of type str. None draws all layers alike."),
    ("layer_weights", 1.0, TypeError, f"{ONE_EACH}, got 1.0 of type float. None draws all layers alike."),
    ("layer_weights", ["1"], TypeError, f"{ONE_EACH}, got ['1'] of type list. None draws all layers alike."),
    (
        "layer_weights",
        {"first": 1},
        TypeError,
        f"{ONE_EACH}, got {{'first': 1}} of type dict. None draws all layers alike.",
    ),
    *(
        ("layer_weights", w, ValueError, f"finite, >= 0 and not all zero, got {w}. None draws all layers alike.")
        for w in ([-1], [0, 0, 0], [], [math.nan, 1, 1], [math.inf, 1, 1])
    ),
    ("layers", 3, TypeError, f"{LAYER_KINDS}, got 3 of type int. {LAYERS_HINT}"),
    ("layers", ["first", None], TypeError, f"{LAYER_KINDS}, got None of type NoneType. {LAYERS_HINT}"),
    ("layers", {"first": 1}, TypeError, f"{LAYER_KINDS}, got {{'first': 1}} of type dict. {LAYERS_HINT}"),
    ("loss", 3, TypeError, f"{LOSS_KINDS}, got 3 of type int. {LOSS_HINT}"),
    ("loss", nn.MSELoss, TypeError, f"{LOSS_KINDS}, got {nn.MSELoss!r} of type type. {LOSS_HINT}"),
    ("loss", ["loss", 3], TypeError, f"{LOSS_KINDS}, got 3 of type int. {LOSS_HINT}"),
    ("batch_dim", "x", TypeError, f"{DIMENSIONS}, got 'x' of type str. None learns it."),
    ("batch_dim", True, TypeError, f"{DIMENSIONS}, got True of type bool. None learns it."),
    ("batch_dim", -1, ValueError, f"{DIMENSIONS}, got -1. None learns it."),
    ("batch_dim", {"first": "x"}, TypeError, f"{DIMENSIONS}, got 'x' of type str. None learns it."),
    ("batch_dim", {"first": -1}, ValueError, f"{DIMENSIONS}, got -1. None learns it."),
    ("batch_dim", {0: 1}, TypeError, f"{DIMENSIONS}, got {{0: 1}} of type dict. None learns it."),
    ("batch_size", "a", TypeError, "an integer >= 1, got 'a' of type str. Give the number of rows."),
    ("batch_size", 8.0, TypeError, "an integer >= 1, got 8.0 of type float. Give the number of rows."),
    ("batch_size", 0, ValueError, "an integer >= 1, got 0. Give the number of rows."),
    ("union_masks", "no", TypeError, "True or False, got 'no' of type str. False leaves masks as they are."),
    ("strict", 1, TypeError, "True or False, got 1 of type int. False warns of layers that a path leads around."),
]


def _name(value: Any) -> str | None:
    return (
        value.__name__ if isinstance(value, type) else None if isinstance(value, str) and " " in value else repr(value)
    )


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED, ids=_name)
def test_a_wrong_argument_is_refused_at_construction(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as refusal:
        ManifoldMixupCallback(**{name: value})
    assert str(refusal.value) == f"{name} must be {message}"


@pytest.mark.parametrize(("argument", "kind"), [("layers", "layer"), ("loss", "loss")])
def test_an_empty_list_is_refused_at_construction(argument: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} must name at least one {kind}, got \[\]\. "):
        ManifoldMixupCallback(**{argument: []})


CHANGEABLE = ("alpha", "probability", "pairing", "layer_weights", "seed")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), [case for case in REFUSED if case[0] in CHANGEABLE], ids=_name
)
def test_a_wrong_value_set_during_a_fit_is_refused_in_the_same_words(
    make_trainer: MakeTrainer, name: str, value: Any, error: type[Exception], message: str
) -> None:
    class Changing(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                setattr(callback, name, value)

    callback, model = ManifoldMixupCallback(layers=LAYERS, layer_weights=[1, 1, 1], seed=1), Classifier()
    with pytest.raises(error) as refusal:
        make_trainer(callback, Changing()).fit(model, loader())
    assert str(refusal.value) == f"{name} must be {message}".replace("the eligible", "the 3 eligible")
    assert len(model.seen) == 2  # no third step has trained


def test_weights_that_are_changed_in_place_are_looked_at_again(make_trainer: MakeTrainer) -> None:
    class Changing(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            callback.layer_weights[:] = weights[batch_idx]  # type: ignore[index]

    weights = [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, -1]]
    callback = ManifoldMixupCallback(layers=LAYERS, layer_weights=[1, 0, 0])
    plans = Plans(callback)
    with pytest.raises(ValueError, match=r"^layer_weights must be finite, >= 0 and not all zero, got \[0, 0, -1\]\."):
        make_trainer(callback, plans, Changing()).fit(Classifier(), loader())
    assert [plan.layer for plan in plans.plans] == ["input", "first", "second", "input"]


def test_alpha_may_be_set_during_a_fit(make_trainer: MakeTrainer) -> None:
    class Off(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            callback.alpha = 0

    callback = ManifoldMixupCallback(layers=LAYERS)
    plans = Plans(callback)
    make_trainer(callback, plans, Off()).fit(Classifier(), loader())
    assert callback.ratio == BetaRatio(0)
    assert [plan.mixes for plan in plans.plans] == [True, False, False, False, False]


def test_per_sample_must_not_change_during_a_fit(make_trainer: MakeTrainer) -> None:
    class Changing(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            callback.ratio = BetaRatio(2.0, per_sample=True)

    callback = ManifoldMixupCallback(layers=LAYERS)
    with pytest.raises(RuntimeError, match=r"^layers, per_sample, interpolation, .* must not change during a fit"):
        make_trainer(callback, Changing()).fit(Classifier(), loader())


@pytest.mark.parametrize("batch_dim", [{"frist": 0}, {"first": 0, "frist": 0}], ids=["one", "one-of-two"])
def test_a_batch_dim_of_no_layer_is_refused(make_trainer: MakeTrainer, batch_dim: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^batch_dim must name layers of Classifier, got 'frist'\. mm_lightning\.ins"):
        make_trainer(ManifoldMixupCallback(layers=LAYERS, batch_dim=batch_dim)).fit(Classifier(), loader())


def test_numbers_of_numpy_and_torch_are_taken_and_saved_as_those_of_python(
    make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    settings: dict[str, Any] = {
        "alpha": np.float32(2.0),
        "per_sample": np.bool_(False),
        "probability": np.float64(1.0),
        "seed": np.int64(3),
        "layer_weights": np.array([1.0, 2.0, 3.0]),
        "batch_size": np.int64(8),
        "union_masks": torch.tensor(True),
    }
    trainer = make_trainer(ManifoldMixupCallback(layers=LAYERS, schedule=None, **settings))
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["mm_lightning"] == {
        "alpha": 2.0,
        "per_sample": False,
        "probability": 1.0,
        "seed": 3,
        "layers": LAYERS,
        "layer_weights": [1.0, 2.0, 3.0],
        "pairing": "RandomPermutation()",
    }


@pytest.mark.parametrize(
    ("callback", "shown"),
    [
        (ManifoldMixupCallback(), "ManifoldMixupCallback(alpha=2.0, layers='auto')"),
        (
            ManifoldMixupCallback(
                1.0,
                ("input", nn.Linear),
                True,
                0.5,
                3,
                pairing=Roll(),
                layer_weights=(1, 2),
                loss=["loss", nn.functional.mse_loss],
                batch_dim={"first": 0},
                batch_size=8,
                union_masks=False,
                strict=True,
            ),
            "ManifoldMixupCallback(alpha=1.0, layers=['input', Linear], per_sample=True, probability=0.5, seed=3, "
            "pairing=Roll(), layer_weights=[1, 2], loss=['loss', mse_loss], batch_dim={'first': 0}, batch_size=8, "
            "union_masks=False, strict=True)",
        ),
    ],
    ids=["defaults", "everything"],
)
def test_repr_is_the_call_that_makes_it(callback: ManifoldMixupCallback, shown: str) -> None:
    assert repr(callback) == shown
    names = {"Linear": nn.Linear, "mse_loss": nn.functional.mse_loss, "Roll": Roll}
    assert repr(eval(shown, {**names, "ManifoldMixupCallback": ManifoldMixupCallback})) == shown


def test_repr_shows_what_was_changed_and_the_class() -> None:
    class Mine(ManifoldMixupCallback):
        pass

    callback = Mine(layers="first")
    callback.alpha, callback.probability = 0.5, 0.25
    assert repr(callback) == "Mine(alpha=0.5, layers='first', probability=0.25)"


@pytest.mark.parametrize(("version", "count"), [((2, 4), 1), ((2, 5), 0)])
def test_a_trainer_that_resumes_a_batch_too_early_is_told_of(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], count: int
) -> None:
    monkeypatch.setattr("mm_lightning.callback.version_of", lambda trainer: version)

    def train(ckpt_path: Path | None = None, **settings: Any) -> list[str]:
        saving = ModelCheckpoint(tmp_path, "part", every_n_train_steps=3)
        trainer = make_trainer(ManifoldMixupCallback(layers=LAYERS), saving, enable_checkpointing=True, **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Classifier(), loader(), ckpt_path=ckpt_path)
        return [str(one.message) for one in caught if "before 2.5" in str(one.message)]

    assert train(max_steps=3) == []  # from the beginning
    said = (
        "lightning before 2.5 counts one batch too few when it resumes within an epoch, so a plan is drawn twice and a "
        "batch trained twice. For an exact resume update lightning, or save at the end of epochs."
    )
    assert train(tmp_path / "part.ckpt") == [said] * count
