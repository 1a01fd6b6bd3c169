"""MixableModule against its own blocks, run by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback, MixableModule, MixPlan, MixPoint, mixed_accuracy
from mm_lightning.models import mlp_blocks

MakeTrainer = Callable[..., pl.Trainer]


def model(mix_before: Any = (0, 1, 2), **settings: Any) -> MixableModule:
    torch.manual_seed(0)
    return MixableModule(mlp_blocks([6, 8, 8, 3], mix_before), **settings).double()


def rows(n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def loader(n: int = 30) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(n)), batch_size=10)


def _reference_logits(module: MixableModule, x: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Forward pass of mlp_blocks from its weights, mixing before the planned block."""
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    hidden = x
    for i, linear in enumerate(linears):
        name = "input" if i == 0 else f"mix_before.{i}"
        if plan is not None and plan.layer == name:
            lam = plan.lam.double()[:, None]
            hidden = lam * hidden + (1 - lam) * hidden[plan.partner]
        hidden = hidden @ linear.weight.T + linear.bias
        if i < len(linears) - 1:
            hidden = torch.where(hidden > 0, hidden, 0.3 * hidden)
    return hidden


def test_mixing_is_before_the_eligible_blocks() -> None:
    points = [name for name, module in model((0, 2)).named_modules() if isinstance(module, MixPoint)]
    assert sorted(points) == ["input", "mix_before.2"]
    assert not [m for m in model(()).modules() if isinstance(m, MixPoint)]


def test_forward_runs_the_blocks_in_order() -> None:
    module = model()
    x, _ = rows()
    torch.testing.assert_close(module(x), _reference_logits(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
def test_every_step_equals_the_formulas(make_trainer: MakeTrainer, per_sample: bool) -> None:
    module = model(optimizer=partial(torch.optim.SGD, lr=0.05))
    callback = ManifoldMixupCallback(alpha=1.0, per_sample=per_sample, seed=2, schedule=None)
    drawn = set()

    class Check(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            plan = callback.plan
            assert plan is not None
            drawn.add(plan.layer)
            start = trainer.fit_loop.epoch_loop.batch_idx * 10
            x, y = (tensor[start : start + 10] for tensor in rows())
            lam = plan.lam.double()
            log_probs = _reference_logits(module, x, plan).log_softmax(dim=1)
            picked = lam * log_probs[range(10), y] + (1 - lam) * log_probs[range(10), y[plan.partner]]
            parameters = [p for p in module.parameters() if p.requires_grad]
            for parameter, grad in zip(parameters, torch.autograd.grad(-picked.mean(), parameters), strict=True):
                torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)
            torch.testing.assert_close(trainer.callback_metrics["train/loss"].double(), -picked.mean())

    make_trainer(callback, Check(), max_epochs=5, log_every_n_steps=1).fit(module, loader())
    assert drawn == {"input", "mix_before.1", "mix_before.2"} == set(callback.layer_names)


def test_it_logs_what_the_table_says(make_trainer: MakeTrainer) -> None:
    module = model(optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = make_trainer()
    trainer.fit(module, loader(), loader())
    x, y = rows()
    probs = _reference_logits(module, x).detach().softmax(dim=1)
    nll = float(-probs[range(30), y].log().mean())
    acc = sum(int(row.argmax()) == int(own) for row, own in zip(probs, y, strict=True)) / 30
    ece = 0.0
    for low in range(15):  # bins (low/15, (low+1)/15]
        members = [i for i in range(30) if low / 15 < float(probs[i].max()) <= (low + 1) / 15]
        if members:
            hit = sum(int(probs[i].argmax()) == int(y[i]) for i in members) / len(members)
            ece += len(members) / 30 * abs(hit - sum(float(probs[i].max()) for i in members) / len(members))
    wanted = {"val/loss": nll, "val/nll": nll, "val/acc": acc, "val/ece": ece, "train/acc_mixed": acc}
    got = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert set(got) == {*wanted, "train/loss"}
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-6), key
    trainer.test(module, loader(), verbose=False)
    assert {key: float(value) for key, value in trainer.callback_metrics.items()} == pytest.approx(
        {key.replace("val/", "test/"): value for key, value in wanted.items() if key.startswith("val/")}, abs=1e-6
    )


@pytest.mark.parametrize("many", [1, 2, 3, 1000])
def test_accuracy_of_an_epoch_is_that_of_its_rows(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr("mm_lightning.module._MANY", many)
    module = model(optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader(25))  # batches of 10, 10 and 5
    x, y = rows(25)
    hits = [int(row.argmax()) == int(own) for row, own in zip(_reference_logits(module, x), y, strict=True)]
    assert sum(hits[:10]) != sum(hits[10:20]) != 2 * sum(hits[20:])  # so that a mean of means would differ
    assert float(trainer.callback_metrics["train/acc_mixed"]) == pytest.approx(sum(hits) / 25, abs=1e-6)


@pytest.mark.parametrize("many", [1, 1000])
def test_an_epoch_cut_short_leaves_nothing_to_the_next_fit(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr("mm_lightning.module._MANY", many)
    module = model(optimizer=partial(torch.optim.SGD, lr=0.0))
    batches = loader(25)

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        make_trainer(Stop()).fit(module, DataLoader(TensorDataset(rows(10)[0], torch.zeros(10).long())))
    trainer = make_trainer()
    trainer.fit(module, batches)
    x, y = rows(25)
    hits = [int(row.argmax()) == int(own) for row, own in zip(_reference_logits(module, x), y, strict=True)]
    assert float(trainer.callback_metrics["train/acc_mixed"]) == pytest.approx(sum(hits) / 25, abs=1e-6)


def test_accuracy_is_weighted_by_lam(make_trainer: MakeTrainer) -> None:
    module, callback = model(optimizer=partial(torch.optim.SGD, lr=0.0)), ManifoldMixupCallback(seed=4)
    trainer = make_trainer(callback)
    trainer.fit(module, loader(10))  # one batch
    plan = callback.plan
    assert plan is not None
    x, y = rows(10)
    predicted = _reference_logits(module, x, plan).argmax(dim=1).tolist()
    lam, partner = float(plan.lam[0]), plan.partner.tolist()
    hits = [lam * (k == int(y[i])) + (1 - lam) * (k == int(y[partner[i]])) for i, k in enumerate(predicted)]
    assert float(trainer.callback_metrics["train/acc_mixed"]) == pytest.approx(sum(hits) / 10, abs=1e-6)


def test_optimizer_and_scheduler_come_from_their_partials(make_trainer: MakeTrainer) -> None:
    module = model(
        optimizer=partial(torch.optim.SGD, lr=0.5), scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    )
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader())
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_the_default_optimizer_is_adam() -> None:
    optimizer = model().configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_scheduler_can_advance_every_step(make_trainer: MakeTrainer) -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    module = model(optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=scheduler, scheduler_interval="step")
    trainer = make_trainer()
    trainer.fit(module, loader())  # three steps
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_another_loss_is_used_as_it_is(make_trainer: MakeTrainer) -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    module = model(loss=loss, optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = make_trainer()
    trainer.fit(module, loader(), loader())
    x, y = rows()
    log_probs = _reference_logits(module, x).detach().log_softmax(dim=1)
    smoothed = 0.8 * F.one_hot(y, 3) + 0.2 / 3
    assert module.loss is loss
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(-(smoothed * log_probs).sum(1).mean()))


def test_predict_gives_probabilities(make_trainer: MakeTrainer) -> None:
    module = model()
    probabilities = torch.cat(make_trainer().predict(module, loader()))
    torch.testing.assert_close(probabilities, _reference_logits(module, rows()[0]).softmax(dim=1))


def test_mix_points_leave_no_trace_in_the_weights() -> None:
    assert list(model((0, 1, 2)).state_dict()) == list(model(()).state_dict())
    model(()).load_state_dict(model((0, 1, 2)).state_dict())


@pytest.mark.parametrize("mixup", [False, True], ids=["plain", "mixed"])
def test_a_class_without_an_output_is_named(make_trainer: MakeTrainer, mixup: bool) -> None:
    x, y = rows()
    callbacks = [ManifoldMixupCallback()] if mixup else []
    with pytest.raises(ValueError, match="batch holds class 7, but the network has 3 outputs, for classes 0 to 2"):
        make_trainer(*callbacks).fit(model(), DataLoader(TensorDataset(x, y + 5), batch_size=30))


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([], ValueError, "blocks is empty"),
        ([nn.Linear(2, 2)], TypeError, r"must be \(module, True or False\), got Linear"),
        ([(nn.Linear(2, 2), "yes")], TypeError, r"must be \(module, True or False\)"),
        ([(nn.Flatten(), True)], ValueError, "Give num_classes"),
    ],
)
def test_blocks_that_are_none_are_refused(blocks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixableModule(blocks)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"loss": "mse"},
            TypeError,
            "a loss module or a function of (logits, targets), got 'mse' of type str. None is nn.CrossEntropyLoss().",
        ),
        (
            {"loss": nn.NLLLoss},
            TypeError,
            "a loss module or a function of (logits, targets), got <class 'torch.nn.modules.loss.NLLLoss'> of type "
            "type. None is nn.CrossEntropyLoss().",
        ),
        (
            {"optimizer": 0},
            TypeError,
            "a function that makes an optimizer from parameters, got 0 of type int. "
            "Give functools.partial(torch.optim.SGD, lr=0.1), say.",
        ),
        (
            {"scheduler": "cosine"},
            TypeError,
            "a function that makes a scheduler from an optimizer, got 'cosine' of type str. "
            "None keeps the learning rate constant.",
        ),
        ({"num_classes": 0}, ValueError, "an integer >= 2, got 0. None takes it from the blocks."),
        ({"num_classes": -3}, ValueError, "an integer >= 2, got -3. None takes it from the blocks."),
        ({"num_classes": "3"}, TypeError, "an integer >= 2, got '3' of type str. None takes it from the blocks."),
        ({"num_classes": True}, TypeError, "an integer >= 2, got True of type bool. None takes it from the blocks."),
        ({"blocks": 3}, TypeError, "a list of (module, eligible), got 3 of type int. Give at least one."),
    ],
    ids=lambda value: "_".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_arguments_that_are_none_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        MixableModule(**{"blocks": [(nn.Linear(2, 2), True)], **arguments})
    assert str(refusal.value) == f"{next(iter(arguments))} must be {message}"


def test_numbers_and_booleans_of_numpy_are_as_good() -> None:
    module = MixableModule([(nn.Flatten(), np.bool_(True))], num_classes=np.int64(3))
    assert module.val_metrics.accuracy.num_classes == 3
    assert list(module.named_children())[2][0] == "input"


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="scheduler_interval must be 'epoch' or 'step', got 'day'"):
        model(scheduler_interval="day")


@pytest.mark.parametrize(
    ("sizes", "mix_before", "message"),
    [([3], (), "at least two"), ([3, 0, 2], (), "integers >= 1"), ([3, 2], (1,), r"names the blocks \[1\]")],
)
def test_perceptrons_that_do_not_fit_are_refused(sizes: list[int], mix_before: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp_blocks(sizes, mix_before)


def test_perceptrons_start_glorot_uniform() -> None:
    torch.manual_seed(0)
    linear = mlp_blocks([400, 200])[0][0][-1]
    bound = (6 / 600) ** 0.5
    assert linear.weight.abs().max() <= bound
    assert float(linear.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not linear.bias.any()


def test_mixed_accuracy_without_a_plan_is_plain() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(mixed_accuracy(logits, torch.tensor([0, 1, 1, 1]))) == 0.75


def test_the_loss_is_logged_as_often_as_loggers_take_it(make_trainer: MakeTrainer) -> None:
    logged = []

    class Watching(MixableModule):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            if name == "train/loss":
                logged.append(self.trainer.global_step)
            super().log(name, *args, **kwargs)

    module = Watching(mlp_blocks([6, 8, 3])).double()
    make_trainer(log_every_n_steps=4, max_epochs=2).fit(module, loader(100))  # ten steps an epoch
    assert logged == [3, 7, 9, 11, 15, 19]
