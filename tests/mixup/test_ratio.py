import math

import numpy as np
import pytest
import torch

from mm_lightning.mixup import BetaRatio

ALPHAS = (0.05, 0.2, 1.0, 2.0, 7.5)


def draw(alpha: float, batch_size: int, seed: int = 0) -> np.ndarray:
    return BetaRatio(alpha, per_sample=True)(np.random.default_rng(seed), batch_size)


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 2.0, 1e3])
def test_ratios_lie_between_zero_and_one(alpha: float) -> None:
    lam = draw(alpha, 10_000)
    assert lam.dtype == np.float64
    assert np.isfinite(lam).all()
    assert lam.min() >= 0
    assert lam.max() <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_one_ratio_is_drawn_for_the_batch_unless_per_sample(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    assert BetaRatio(2.0)(rng, batch_size).shape == (1,)
    lam = BetaRatio(2.0, per_sample=True)(rng, batch_size)
    assert lam.shape == (batch_size,)
    assert len(set(lam.tolist())) == batch_size


@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
def test_alpha_zero_draws_ones(per_sample: bool) -> None:
    lam = BetaRatio(0, per_sample=per_sample)(np.random.default_rng(0), 5)
    assert lam.tolist() == [1.0] * (5 if per_sample else 1)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_mean_is_one_half(alpha: float) -> None:
    num_draws = 40_000
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(draw(alpha, num_draws).mean() - 0.5) < 4 * math.sqrt(variance / num_draws)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_variance_is_that_of_the_beta_distribution(alpha: float) -> None:
    num_draws = 40_000
    variance = 1 / (4 * (2 * alpha + 1))
    # A sample variance has the variance (mu_4 - variance^2) / n; Beta(a, a) has the excess kurtosis -6 / (2a + 3).
    kurtosis = 3 - 6 / (2 * alpha + 3)
    standard_error = variance * math.sqrt((kurtosis - 1) / num_draws)
    assert abs(np.square(draw(alpha, num_draws) - 0.5).mean() - variance) < 4 * standard_error


def test_ratio_per_batch_has_the_variance_of_the_beta_distribution() -> None:
    rng, num_draws, alpha = np.random.default_rng(1), 10_000, 2.0
    lam = np.array([BetaRatio(alpha)(rng, 8)[0] for _ in range(num_draws)])
    variance, kurtosis = 0.05, 3 - 6 / 7  # of Beta(2, 2)
    assert abs(np.square(lam - 0.5).mean() - variance) < 4 * variance * math.sqrt((kurtosis - 1) / num_draws)


def test_draws_come_from_the_given_generator_alone() -> None:
    assert draw(2.0, 6, seed=3).tolist() == draw(2.0, 6, seed=3).tolist()
    assert draw(2.0, 6, seed=3).tolist() != draw(2.0, 6, seed=4).tolist()


@pytest.mark.parametrize("alpha", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be a finite number >= 0, got {alpha}\. 0 switches mixing off"):
        BetaRatio(alpha)


@pytest.mark.parametrize(
    ("alpha", "described"),
    [
        pytest.param(True, "True of type bool", id="bool"),
        pytest.param("2.0", "'2.0' of type str", id="str"),
        pytest.param(None, "None of type NoneType", id="None"),
    ],
)
def test_alpha_of_another_type_is_refused(alpha: object, described: str) -> None:
    with pytest.raises(
        TypeError, match=rf"^alpha must be a finite number >= 0, got {described}\. 0 switches mixing off\.$"
    ):
        BetaRatio(alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("per_sample", ["yes", 1, None], ids=str)
def test_per_sample_of_another_type_is_refused(per_sample: object) -> None:
    with pytest.raises(TypeError) as refusal:
        BetaRatio(1.0, per_sample)  # type: ignore[arg-type]
    assert str(refusal.value) == (
        f"per_sample must be True or False, got {per_sample!r} of type {type(per_sample).__name__}. "
        "False draws one lam for the batch."
    )


@pytest.mark.parametrize("alpha", [np.float32(2.0), np.int64(2), 2], ids=["float32", "int64", "int"])
@pytest.mark.parametrize("yes", [np.bool_(True), torch.tensor(True)], ids=["numpy", "torch"])
def test_numbers_and_booleans_of_numpy_and_torch_are_as_good(alpha: float, yes: bool) -> None:
    drawn = BetaRatio(alpha, yes)(np.random.default_rng(0), 5)
    assert drawn.tolist() == draw(2.0, 5).tolist()


def test_repr_is_the_call_that_makes_it() -> None:
    assert repr(BetaRatio(0.5, per_sample=True)) == "BetaRatio(alpha=0.5, per_sample=True, beta=None)"
