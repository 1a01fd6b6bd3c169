from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mm_lightning.evaluation import FGSM, PGD, bounds_of_images, bounds_of_rows

X = torch.tensor([[0.5, 0.2], [0.1, 0.9], [0.97, 0.02]], dtype=torch.float64)
Y = torch.tensor([0, 1, 1])
PLAIN = bounds_of_images([0.0], [1.0])._replace(low=torch.zeros(1), high=torch.ones(1), unit=torch.ones(1))


class Logistic(nn.Module):
    """Logits W x; the gradient of the cross-entropy of row i by its input is W^T (softmax - one-hot)."""

    weight = torch.tensor([[1.0, -2.0], [-1.0, 0.5], [0.3, 0.7]], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(self.weight.clone())
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) @ self.w.T


def _sign(x: Tensor) -> Tensor:
    """The sign of the gradient, row by row, by hand."""
    rows = []
    for row, target in zip(x, Y, strict=True):
        z = [float(w @ row) for w in Logistic.weight]
        total = sum(torch.tensor(z).double().exp().tolist())
        p = [float(torch.tensor(one).double().exp()) / total for one in z]
        slope = sum((p[k] - float(k == target)) * Logistic.weight[k] for k in range(3))
        rows.append(torch.as_tensor(slope).sign())
    return torch.stack(rows)


def test_fgsm_moves_along_the_sign_of_the_gradient_within_the_bounds() -> None:
    network = Logistic().train()
    got = FGSM(0.1)(network, X, Y, PLAIN)
    assert_close(got, (X + 0.1 * _sign(X)).clamp(0, 1), rtol=0, atol=1e-15)
    assert (got[2] - X[2]).abs().min() < 0.05  # the clip was of use
    assert network.dropout.training


def test_epsilon_is_in_pixels_of_images_that_were_normalised() -> None:
    images = torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64)
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.1, 0.25])
    inputs = (images - mean[:, None, None]) / std[:, None, None]
    got = FGSM(0.2)(lambda x: torch.cat([x.sum((1, 2, 3)), -x.sum((1, 2, 3))]).reshape(1, 2), inputs, Y[:1], bounds)
    pixels = got * std[:, None, None] + mean[:, None, None]
    assert_close(pixels, torch.full_like(pixels, 0.3))  # the target's logit rises with each pixel
    far = FGSM(0.9)(lambda x: torch.cat([x.sum((1, 2, 3)), -x.sum((1, 2, 3))]).reshape(1, 2), inputs, Y[:1], bounds)
    assert_close(far * std[:, None, None] + mean[:, None, None], torch.zeros_like(pixels), rtol=0, atol=1e-6)


bounds = bounds_of_images([0.4, 0.5], [0.1, 0.25])


def _reference_pgd(epsilon: float, step: float, steps: int, start: Tensor) -> Tensor:
    x = start
    for _ in range(steps):
        x = x + step * _sign(x)
        x = torch.minimum(torch.maximum(x, X - epsilon), X + epsilon).clamp(0, 1)
    return x


def test_pgd_agrees_with_a_loop() -> None:
    got = PGD(0.1, 0.04, 4, random_start=False)(Logistic().eval(), X, Y, PLAIN)
    assert_close(got, _reference_pgd(0.1, 0.04, 4, X), rtol=0, atol=1e-15)
    draw = 2 * torch.rand(3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1
    start = (X + 0.1 * draw).clamp(0, 1)
    rng = torch.Generator().manual_seed(5)
    assert_close(PGD(0.1, 0.04, 0)(Logistic(), X, Y, PLAIN, rng), start, rtol=0, atol=1e-15)
    rng.manual_seed(5)
    assert_close(
        PGD(0.1, 0.04, 3)(Logistic(), X, Y, PLAIN, rng), _reference_pgd(0.1, 0.04, 3, start), rtol=0, atol=1e-15
    )


def test_one_step_of_the_size_of_epsilon_is_fgsm_and_epsilon_zero_the_identity() -> None:
    network = Logistic()
    assert_close(PGD(0.1, 0.1, 1, random_start=False)(network, X, Y, PLAIN), FGSM(0.1)(network, X, Y, PLAIN))
    assert_close(FGSM(0)(network, X, Y, PLAIN), X, rtol=0, atol=0)
    assert_close(PGD(0, 0.1, 3)(network, X, Y, PLAIN), X, rtol=0, atol=0)


def test_an_input_outside_of_the_bounds_is_not_brought_in() -> None:
    inside = bounds_of_rows(torch.tensor([[0.2, 0.0], [0.6, 0.5]], dtype=torch.float64))
    got = FGSM(0.5)(Logistic(), X, Y, inside)
    wanted = X + 0.5 * torch.tensor([0.4, 0.5]) * _sign(X)
    low, high = torch.minimum(torch.tensor([0.2, 0.0]), X), torch.maximum(torch.tensor([0.6, 0.5]), X)
    assert_close(got, torch.minimum(torch.maximum(wanted, low), high), check_dtype=False)


def test_each_row_is_attacked_for_itself() -> None:
    whole = FGSM(0.1)(Logistic(), X, Y, PLAIN)
    for i in range(3):
        assert_close(FGSM(0.1)(Logistic(), X[i : i + 1], Y[i : i + 1], PLAIN), whole[i : i + 1], rtol=0, atol=0)


@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1, 0.05, 2)], ids=["fgsm", "pgd"])
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=["grad", "no", "inference"]
)
def test_nothing_is_left_behind(attack: Any, mode: Any) -> None:
    network = Logistic().train()
    network.w.requires_grad_(False)
    want = attack(Logistic(), X, Y, PLAIN)
    before = torch.random.get_rng_state()
    with mode():
        x, y = X.clone(), Y.clone()
        got = attack(network, x, y, PLAIN)
        assert torch.equal(x, X)
    assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not got.requires_grad
    assert not got.is_inference()
    assert network.w.grad is None
    assert not network.w.requires_grad
    assert all(one.training for one in network.modules())


def test_modes_are_put_back_after_an_exception() -> None:
    class Failing(Logistic):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("boom")

    network = Failing().train()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="boom"):
            FGSM(0.1)(network, X, Y, PLAIN)
        assert not torch.is_grad_enabled()
    assert all(one.training for one in network.modules())


@pytest.mark.parametrize("margin", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "single"])
def test_a_network_that_is_sure_is_attacked_like_any_other(margin: float, dtype: torch.dtype) -> None:
    # logits 0, -margin, -margin; the gradient by the input is (1 - p) times half the sum of the rows below: 1, -2, 0.5
    weight = torch.tensor([[1.0, 0.0, -1.0], [3.0, -3.0, 0.0], [1.0, -1.0, -1.0]], dtype=dtype)
    bias = torch.tensor([0.0, -margin, -margin], dtype=dtype)
    network = lambda x: bias + x @ weight.T  # noqa: E731
    got = FGSM(0.25)(network, torch.zeros(1, 3, dtype=dtype), torch.tensor([0]), WIDE)
    assert got.tolist() == [[0.25, -0.25, 0.25]]


WIDE = PLAIN._replace(low=-torch.ones(1))


def test_rows_without_a_target_stay() -> None:
    got = FGSM(0.1)(Logistic(), X, torch.tensor([0, -100, 1]), PLAIN)
    want = FGSM(0.1)(Logistic(), X, Y, PLAIN)
    assert_close(got, torch.stack([want[0], X[1], want[2]]), rtol=0, atol=0)


def test_one_logit_is_that_of_class_one() -> None:
    targets = torch.tensor([0, 1, 1])
    got = FGSM(0.01)(lambda x: x[:, 0], X, targets, PLAIN)
    assert_close(got - X, torch.tensor([[0.01, 0], [-0.01, 0], [-0.01, 0]], dtype=torch.float64), rtol=0, atol=1e-12)


def test_misuse_is_named() -> None:
    with pytest.raises(RuntimeError, match="logits cannot be differentiated by the inputs"):
        FGSM(0.1)(lambda x: x.detach(), X, Y % 2, PLAIN)
    other = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated by the inputs: .* on something else"):
        FGSM(0.1)(lambda x: 2 * other, X, Y % 2, PLAIN)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 3\), got 0 to 3: count from 0"):
        FGSM(0.1)(Logistic(), X, torch.tensor([0, 1, 3]), PLAIN)
    with pytest.raises(ValueError, match=r"targets must be integer \(3,\), a class for each input, got torch"):
        FGSM(0.1)(Logistic(), X, Y[:1], PLAIN)
    with pytest.raises(ValueError, match=r"epsilon must be a number >= 0, got -1\. 0 changes nothing"):
        FGSM(-1)
    with pytest.raises(ValueError, match="step_size must be a number >= 0, got -1"):
        PGD(step_size=-1)
    with pytest.raises(TypeError, match=r"steps must be an integer >= 0, got 1\.5"):
        PGD(steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="random_start must be True or False, got 2"):
        PGD(random_start=2)  # type: ignore[arg-type]


def test_bounds_of_rows_are_by_channel_or_feature() -> None:
    images = torch.tensor([[0.0, 1.0, 0.5, 1.0], [-2.0, 2.0, 0.0, 1.0]]).reshape(2, 2, 2, 1)  # channel 0: 0 1 -2 2
    found = bounds_of_rows(images)
    assert found.low.flatten().tolist() == [-2.0, 0.0]
    assert found.high.flatten().tolist() == [2.0, 1.0]
    assert found.unit.flatten().tolist() == [4.0, 1.0]
    assert found.low.shape == (2, 1, 1)
    rows = bounds_of_rows(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert (rows.low.tolist(), rows.unit.tolist(), rows.std.tolist()) == ([1.0, 5.0], [2.0, 0.0], [1.0, 0.0])
    assert bounds_of_rows(torch.tensor([[[1.0], [4.0]]])).unit.item() == 3.0
    assert rows.words == "the range of the training data, by feature"


def test_clipping_lets_what_is_outside_go_no_further() -> None:
    bounds = bounds_of_rows(torch.tensor([[0.0], [1.0]]))
    origin = torch.tensor([[-0.5], [-0.5], [1.5], [1.5], [0.5], [0.5]])
    moved = torch.tensor([[-0.9], [0.2], [1.9], [0.8], [-0.1], [1.1]])
    want = torch.tensor([[-0.5], [0.2], [1.5], [0.8], [0.0], [1.0]])
    assert_close(bounds.clip(moved, origin), want, rtol=0, atol=0)
