"""HOW, with noise: equation 4 of Lim et al. (2022) from the numbers of the plan's seed, and what these numbers are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from ways_by_hand import reference_factors, reference_strengths

from mm_lightning.mixup import FixedRatio, MixPlan, NoisyFeatures, PlanSource, interpolate, normal, uniform

CPU = torch.device("cpu")


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plan_of(way: NoisyFeatures, lam: float = 0.3, batch_index: int = 0, rows: int = 4) -> MixPlan:
    return PlanSource(["layer"], FixedRatio(lam), interpolation=way, seed=2).draw(rows, batch_index=batch_index)


def distance(drawn: Tensor, distribution: Callable[[float], float]) -> float:
    """Kolmogorov's: the largest between the share of draws up to a number and its probability, times sqrt(n)."""
    numbers, n = sorted(drawn.tolist()), len(drawn)
    probabilities = [distribution(x) for x in numbers]
    return math.sqrt(n) * max(max(p - i / n, (i + 1) / n - p) for i, p in enumerate(probabilities))


LIKELY = 1.95  # in one of a thousand samples of the distribution itself it is larger


def beta_2_5(x: float) -> float:
    """Two or more of six even numbers are below x."""
    return 1 - (1 - x) ** 6 - 6 * x * (1 - x) ** 5


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("way", [NoisyFeatures(), NoisyFeatures(0.0, 0.7), NoisyFeatures(1.5, 0.0)], ids=repr)
def test_mix_and_gradient_equal_the_papers_equation(way: NoisyFeatures, shape: tuple[int, ...]) -> None:
    plan, hidden = plan_of(way), states(*shape).requires_grad_()
    lam, partner = plan.lam.tolist(), plan.partner.tolist()
    factor, added = reference_factors(way, plan, shape)
    mixed, used = interpolate(hidden, plan)
    for i in range(4):
        linear = lam[i] * hidden[i] + (1 - lam[i]) * hidden[partner[i]]
        assert_close(mixed[i], factor[i] * linear + added[i], rtol=0, atol=1e-14)
    assert torch.equal(used.lam, plan.lam)
    assert used.shared_lam is not None or used.lam.stride(0) == 0
    grad = states(*shape).cos()
    (got,) = torch.autograd.grad(mixed, hidden, grad)
    expected = torch.zeros(shape, dtype=torch.float64)
    for i in range(4):
        expected[i] += lam[i] * factor[i] * grad[i]
        expected[partner[i]] += (1 - lam[i]) * factor[i] * grad[i]
    assert_close(got, expected, rtol=0, atol=1e-14)


def test_without_noise_the_mix_is_linear() -> None:
    way = NoisyFeatures(0, 0)
    plan, hidden = plan_of(way), states(4, 6)
    expected = plan.lam.double()[:, None] * hidden + (1 - plan.lam.double()[:, None]) * hidden[plan.partner]
    assert_close(interpolate(hidden, plan)[0], expected, rtol=0, atol=1e-15)


def test_strengths_are_beta_2_5_and_independent() -> None:
    drawn = torch.tensor([reference_strengths(plan_of(NoisyFeatures(), batch_index=i)) for i in range(2000)])
    for strengths in drawn.T:
        assert distance(strengths, beta_2_5) < LIKELY
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 4 / math.sqrt(2000)


def test_noise_of_a_batch_has_the_spread_of_its_strength() -> None:
    """The noise is read off the mix itself: of zeros the additive, of ones the multiplicative."""
    rows, count = 4, 20_000
    add, mult = NoisyFeatures(0.4, 0.0), NoisyFeatures(0.0, 0.2)
    noise = interpolate(torch.zeros(rows, count // rows), plan_of(add))[0].double().flatten()
    strength = reference_strengths(plan_of(add))[0]
    assert distance(noise / (0.4 * strength), lambda x: (1 + math.erf(x / math.sqrt(2))) / 2) < LIKELY
    factor = interpolate(torch.ones(rows, count // rows), plan_of(mult))[0].double().flatten()
    strength = reference_strengths(plan_of(mult))[1]
    assert distance((factor - 1) / (0.2 * strength), lambda x: (x + 1) / 2) < LIKELY


def test_strength_of_the_noise_is_drawn_anew_for_each_batch() -> None:
    ratios = []
    for i in range(3):
        plan = plan_of(NoisyFeatures(1.0, 0.0), batch_index=i)
        ratios.append(float(interpolate(torch.zeros(4, 5000, dtype=torch.float64), plan)[0].std()))
        assert ratios[-1] == pytest.approx(reference_strengths(plan)[0], rel=0.03)
    assert len({round(ratio, 2) for ratio in ratios}) == 3


@pytest.mark.parametrize("draw", [uniform, normal], ids=["uniform", "normal"])
def test_numbers_of_a_seed_are_always_the_same_and_its_streams_differ(draw: Any) -> None:
    seed, before = torch.tensor(2**63 - 1), torch.get_rng_state()
    first = draw(seed, (3, 4), CPU)
    assert first.dtype == torch.float32
    assert torch.equal(first, draw(seed.clone(), [3, 4], CPU))
    others = [draw(seed, (3, 4), CPU, stream=1), draw(seed, (3, 4), CPU, stream=2), draw(seed - 1, (3, 4), CPU)]
    for i, one in enumerate([first, *others]):
        assert all(not torch.equal(one, other) for other in others[i:])
    assert torch.equal(torch.get_rng_state(), before)


def test_even_numbers_are_even() -> None:
    drawn = torch.cat([uniform(torch.tensor(seed), (500,), CPU, stream=seed % 3) for seed in range(40)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert distance(drawn, lambda x: x) < LIKELY


@pytest.mark.parametrize("name", ["add_noise", "mult_noise"])
@pytest.mark.parametrize("level", [-0.1, math.inf, math.nan])
def test_noise_out_of_range_is_refused(name: str, level: float) -> None:
    message = f"{name} must be a finite number >= 0, got {level}. 0 adds none."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NoisyFeatures(**{name: level})
