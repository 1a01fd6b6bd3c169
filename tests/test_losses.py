"""SoftmaxBCE against nn.BCELoss, numbers by hand, and the callback that mixes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import Plans, weights_of
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback, MixableModule
from mm_lightning.losses import SoftmaxBCE

LOSS = SoftmaxBCE()


def draws(rows: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(0, classes, (rows,), generator=generator)


def _reference(logits: Tensor, soft_targets: Tensor) -> Tensor:
    """As the authors write it."""
    return nn.BCELoss()(logits.softmax(dim=1), soft_targets)


@pytest.mark.parametrize(("rows", "classes"), [(7, 10), (1, 2), (3, 100)])
def test_it_is_binary_cross_entropy_on_softmax_probabilities(rows: int, classes: int) -> None:
    logits, targets = draws(rows, classes)
    loss, expected = LOSS(logits, targets), _reference(logits, F.one_hot(targets, classes).double())
    assert loss.dtype == torch.float64
    assert_close(loss, expected, rtol=0, atol=1e-14)
    (own,), (other,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    assert_close(own, other, rtol=0, atol=1e-14)


def test_numbers_by_hand() -> None:
    # p = (1/2, 1/3, 1/6): of class 1 -log(1/2) - log(1/3) - log(5/6) = log(36/5), a third of it
    logits = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64).log()
    assert float(LOSS(logits, torch.tensor([1]))) == pytest.approx(math.log(36 / 5) / 3, abs=1e-15)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_at_uniform_logits_its_gradient_is_that_of_cross_entropy_over_the_other_classes(classes: int) -> None:
    # by hand, of row n and class k: cross-entropy (1/K - t) / N; this one (1/K - t) / (N (K - 1))
    logits = torch.full((4, classes), 0.7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 1, 0])
    (own,) = torch.autograd.grad(LOSS(logits, targets), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    by_hand = (1 / classes - F.one_hot(targets, classes).double()) / 4
    assert_close(plain, by_hand, rtol=0, atol=1e-15)
    assert_close(own, by_hand / (classes - 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("logits", "target", "loss", "gradient"),
    [
        pytest.param([200.0, 0.0], 0, 0.0, [0.0, 0.0], id="sure and right"),
        # -log(p_1) = 200 and -log(1 - p_0) = 200; each of their slopes is 1
        pytest.param([200.0, 0.0], 1, 200.0, [1.0, -1.0], id="sure and wrong, where nn.BCELoss stops at 100"),
        pytest.param([0.0, -5e4, 5e4], 0, 1e5 / 3, [-2 / 3, 0.0, 2 / 3], id="large"),
        pytest.param([1e4, 1e4, -1e4], 0, 2 * math.log(2) / 3, [-1 / 3, 1 / 3, 0.0], id="two alike"),
    ],
)
def test_extreme_logits(
    logits: list[float], target: int, loss: float, gradient: list[float], dtype: torch.dtype
) -> None:
    scores = torch.tensor([logits], dtype=dtype, requires_grad=True)
    found = LOSS(scores, torch.tensor([target]))
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6, abs=1e-30)
    assert_close(scores.grad, torch.tensor([gradient], dtype=dtype), rtol=1e-6, atol=1e-7)


def test_a_small_rest_is_not_lost_in_single_precision() -> None:
    # p_0 is 1 in float32, and yet log(1 - p_0) = log(p_1) = -20 - log(1 + exp(-20))
    logits = torch.tensor([[20.0, 0.0]])
    assert float(LOSS(logits, torch.tensor([1]))) == pytest.approx(20.0, rel=1e-6)
    assert float(_reference(logits, torch.tensor([[0.0, 1.0]]))) == pytest.approx(60.0, rel=1e-6)  # of -20 and -100


def test_a_small_loss_is_not_the_difference_of_large_numbers() -> None:
    # with e = exp(-12): -log(p_0) = log(1 + 2 e) and, twice, -log(1 - p_1) = log((1 + 2 e) / (1 + e))
    small = math.exp(-12.0)
    expected = (math.log1p(2 * small) + 2 * math.log1p(small / (1 + small))) / 3
    assert float(LOSS(torch.tensor([[12.0, 0.0, 0.0]]), torch.tensor([0]))) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    logits, targets = draws(5, 4, dtype)
    loss = LOSS(logits, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, LOSS(logits.detach().float(), targets), rtol=0, atol=0)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_mixing_losses_is_mixing_targets() -> None:
    logits, targets = draws(7, 10)
    partner, lam = torch.tensor([3, 4, 2, 0, 1, 6, 5]), 0.3
    one_hot = F.one_hot(targets, 10).double()
    expected = _reference(logits, lam * one_hot + (1 - lam) * one_hot[partner])
    assert_close(lam * LOSS(logits, targets) + (1 - lam) * LOSS(logits, targets[partner]), expected)


def model() -> MixableModule:
    blocks = [(nn.Linear(4, 8), True), (nn.Tanh(), False), (nn.Linear(8, 3), True)]
    module = MixableModule(blocks, loss=SoftmaxBCE(), optimizer=lambda own: torch.optim.SGD(own, lr=0.5)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return module


def test_the_callback_mixes_it_as_the_authors_do(make_trainer: Callable[..., pl.Trainer]) -> None:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    data = TensorDataset(inputs, torch.arange(40) % 3)
    mixup = ManifoldMixupCallback(alpha=1.0, seed=5, schedule=None)
    plans, trained, by_hand = Plans(mixup), model(), model()
    losses: list[Tensor] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].detach())

    make_trainer(mixup, plans, Losses(), max_epochs=2).fit(trained, DataLoader(data, batch_size=8))
    assert {plan.layer for plan in plans.plans} == {"input", "mix_before.2"}
    optimizer, rows = torch.optim.SGD(by_hand.parameters(), lr=0.5), list(DataLoader(data, batch_size=8)) * 2
    for plan, loss, (x, y) in zip(plans.plans, losses, rows, strict=True):
        lam, one_hot = plan.lam.double()[:, None], F.one_hot(y, 3).double()
        if plan.layer == "input":
            x = lam * x + (1 - lam) * x[plan.partner]
        hidden = torch.tanh(by_hand.blocks[0](x))
        if plan.layer != "input":
            hidden = lam * hidden + (1 - lam) * hidden[plan.partner]
        wanted = _reference(by_hand.blocks[2](hidden), lam * one_hot + (1 - lam) * one_hot[plan.partner])
        assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
    assert_close(weights_of(trained), weights_of(by_hand), rtol=0, atol=1e-12)
    assert not torch.allclose(trained.blocks[0].weight, model().blocks[0].weight, atol=1e-3)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), ValueError, r"\(N, K\) for K >= 2 .*\(2, 3, 4\)"),
        (
            torch.zeros(2, 1),
            torch.zeros(2, dtype=torch.int64),
            ValueError,
            r"\(N, K\) for K >= 2 classes, got \(2, 1\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), TypeError, "targets must be class indices, got torch.float32"),
        (torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), ValueError, r"targets must be \(2,\), got \(1,\)\."),
    ],
    ids=["places", "one class", "soft targets", "rows"],
)
def test_what_it_does_not_take_is_refused(
    logits: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LOSS(logits, targets)


@pytest.mark.parametrize("target", [3, -1])
def test_a_class_beyond_the_logits_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match=rf"class {target}, but the network has 3 outputs"):
        model()._loss(torch.zeros(1, 3), torch.tensor([target]))


def test_no_class_is_left_out() -> None:
    with pytest.raises(IndexError, match="-100"):
        LOSS(torch.zeros(2, 3), torch.tensor([1, -100]))  # which nn.CrossEntropyLoss would leave out
