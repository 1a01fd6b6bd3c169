from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mm_lightning.evaluation import TemperatureScaling


def _rows(rows: int, classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits ``scale`` times too large, and targets drawn by them before."""
    rng = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, classes, generator=rng, dtype=torch.float64)
    return scale * logits, torch.multinomial(logits.softmax(dim=1), 1, generator=rng)[:, 0]


def _reference(logits: Tensor, targets: Tensor, middle: float) -> tuple[float, float, float]:
    """The best of a fine grid around ``middle``, and the ends of what 2 N (nll - best) <= 3.841 leaves of it."""
    z, y = logits.numpy(), targets.numpy()
    grid = middle * np.exp(np.linspace(-2, 2, 20_001))
    nll = []
    for t in grid:
        top = (z / t).max(axis=1)
        nll.append(np.mean(top + np.log(np.exp(z / t - top[:, None]).sum(axis=1)) - z[np.arange(len(y)), y] / t))
    left = grid[2 * len(y) * (np.array(nll) - min(nll)) <= 3.841]
    return grid[np.argmin(nll)], left.min(), left.max()


@pytest.mark.parametrize(
    ("rows", "classes", "scale"),
    [(300, 4, 3.0), (60, 2, 1.0), (300, 10, 1000.0), (400, 3, 1e-3)],
    ids=["too sure", "two classes", "huge", "tiny"],
)
def test_the_fit_agrees_with_a_fine_grid(rows: int, classes: int, scale: float) -> None:
    logits, targets = _rows(rows, classes, scale)
    scaling = TemperatureScaling()
    found = scaling.fit(logits, targets)
    best, low, high = _reference(logits, targets, scale)
    assert (found.temperature, found.low, found.high) == pytest.approx((best, low, high), rel=5e-4)
    assert found.rows == rows
    assert_close(scaling.interval, torch.tensor([found.low, found.high], dtype=torch.float64), rtol=0, atol=0)
    # the derivative of the likelihood by T is zero there
    t = torch.tensor(found.temperature, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits / t, targets).backward()
    assert t.grad is not None
    assert abs(t.grad.item() * found.temperature) < 1e-9


def test_two_classes_by_hand() -> None:
    # of four rows with the logit 2, three are right: sigmoid(2 / T) = 3 / 4, so 2 / T = log 3
    targets = torch.tensor([1, 1, 1, 0])
    for logits in (torch.full((4,), 2.0), torch.full((4, 1), 2.0), torch.tensor([[0.0, 2.0]] * 4)):
        assert TemperatureScaling().fit(logits, targets).temperature == pytest.approx(2 / math.log(3), rel=1e-9)


def test_a_constant_added_to_a_row_and_another_order_make_no_difference() -> None:
    logits, targets = _rows(100, 3, 2.0)
    want = TemperatureScaling().fit(logits, targets)
    order = torch.arange(99, -1, -1)
    got = TemperatureScaling().fit((logits + torch.linspace(-50, 50, 100)[:, None])[order], targets[order])
    assert tuple(got) == pytest.approx(tuple(want), rel=1e-9)
    doubled = TemperatureScaling().fit(2 * logits, targets)
    assert tuple(doubled)[:3] == pytest.approx([2 * number for number in want[:3]], rel=1e-9)


def test_logits_are_divided_and_keep_their_dtype() -> None:
    scaling = TemperatureScaling(4.0)
    for dtype in (torch.float16, torch.float32, torch.float64):
        got = scaling(torch.tensor([[2.0, -8.0]], dtype=dtype))
        assert_close(got, torch.tensor([[0.5, -2.0]], dtype=dtype), rtol=0, atol=0)


def test_the_state_dict_holds_temperature_and_interval() -> None:
    scaling, other = TemperatureScaling(), TemperatureScaling()
    found = scaling.fit(*_rows(200, 3, 2.0))
    other.load_state_dict(scaling.state_dict())
    assert (other.temperature.item(), *other.interval.tolist()) == found[:3]
    assert list(scaling.parameters()) == []


def test_few_rows_are_called_uncertain_and_many_are_not() -> None:
    few, many = TemperatureScaling().fit(*_rows(20, 3, 1.0)), TemperatureScaling().fit(*_rows(400, 3, 1.0))
    assert few.is_uncertain
    assert not many.is_uncertain
    assert str(few) == (
        f"temperature {few.temperature:.4g} (95 % interval {few.low:.4g} to {few.high:.4g}, 20 rows): uncertain, more "
        "validation rows would narrow it"
    )
    assert "uncertain" not in str(many)


def test_the_upper_end_is_infinite_where_equal_probabilities_are_as_likely() -> None:
    targets = torch.tensor([1, 1, 0])
    found = TemperatureScaling().fit(torch.full((3,), 2.0), targets)
    # 2 * 3 * (log 2 - H(1/3)) = 0.34 is less than 3.84
    assert found.high == math.inf
    assert found.is_uncertain
    # at the lower end 2 N (nll - best) = 3.841: with s = sigmoid(2 / T), nll = -(2 log s + log(1 - s)) / 3
    s = 1 / (1 + math.exp(-2 / found.low))
    best = -(2 * math.log(2 / 3) + math.log(1 / 3)) / 3
    assert 6 * (-(2 * math.log(s) + math.log(1 - s)) / 3 - best) == pytest.approx(3.8414588)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.eye(3).repeat(4, 1), torch.arange(12) % 3, "all 12 validation rows are right, so .* until T = 0"),
        (-torch.eye(3), torch.arange(3), "the logits say nothing of the 3 validation targets, so .* until T is inf"),
        (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), "the logits say nothing of the 4 validation targets"),
        (torch.eye(2)[:1], torch.tensor([0]), r"two validation rows or more, got shape \(1,\)"),
        (torch.randn(4, 2), torch.tensor([1, 1, 1, 1]), "two classes or more, got 4 validation rows of class 1 alone"),
        (torch.tensor([[0.0, math.nan], [1, 2]]), torch.tensor([0, 1]), "logits must be finite"),
        (torch.eye(2), torch.tensor([0, 2]), r"targets must be in \[0, 2\), got 0 to 2"),
        (torch.eye(3), torch.tensor([0, 1]), r"must return logits \(2, K\) for 2 inputs, got shape \(3, 3\)"),
    ],
    ids=["separable", "all wrong", "no differences", "one row", "one class", "nan", "range", "lengths"],
)
def test_where_no_temperature_is_the_best_none_is_kept(logits: Tensor, targets: Tensor, message: str) -> None:
    scaling = TemperatureScaling(3.0)
    with pytest.raises(ValueError, match=message):
        scaling.fit(logits, targets)
    assert scaling.temperature.item() == 3.0
    assert scaling.interval.isnan().all()


@pytest.mark.parametrize(
    ("value", "error"), [(0.0, ValueError), (-1, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_a_temperature_is_a_number_above_zero(value: float, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"temperature must be a finite number > 0, got .* 1 leaves the logits"):
        TemperatureScaling(value)


def test_a_fit_needs_no_gradients() -> None:
    logits, targets = _rows(50, 3, 2.0)
    want = TemperatureScaling().fit(logits, targets)
    with torch.inference_mode():
        assert TemperatureScaling().fit(logits.requires_grad_().clone(), targets) == want
