import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm_lightning.mixup import BetaRatio, FixedRatio, FoldedRatio, SimilarityRatio, UniformRatio
from mm_lightning.mixup.ratio import alpha_of, is_by_row, with_alpha

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


def reference_moments(alpha: float, beta: float) -> tuple[float, float]:
    """Mean and variance of Beta(alpha, beta)."""
    total = alpha + beta
    return alpha / total, alpha * beta / (total**2 * (total + 1))


@pytest.mark.parametrize(
    ("ratio", "mean", "variance"),
    [
        pytest.param(BetaRatio(3.0, True, beta=1.0), *reference_moments(3, 1), id="beta_3_1"),
        pytest.param(BetaRatio(0.5, True, beta=2.0), *reference_moments(0.5, 2), id="beta_half_2"),
        pytest.param(UniformRatio(per_sample=True), *reference_moments(1, 1), id="uniform"),
        pytest.param(UniformRatio(0.2, 0.6, per_sample=True), 0.4, 0.4**2 / 12, id="uniform_part"),
        # of max(u, 1 - u), with u even, which is even in [1/2, 1]; of Beta(2, 2) it has the density 12 x (1 - x)
        pytest.param(FoldedRatio(UniformRatio(per_sample=True)), 0.75, 0.25 / 12, id="folded_uniform"),
        pytest.param(FoldedRatio(BetaRatio(2.0, True)), 11 / 16, 39 / 80 - (11 / 16) ** 2, id="folded_beta"),
    ],
)
def test_draws_have_the_mean_and_variance_of_their_distribution(ratio: Any, mean: float, variance: float) -> None:
    num_draws = 40_000
    lam = ratio(np.random.default_rng(0), num_draws)
    assert lam.dtype == np.float64
    assert lam.shape == (num_draws,)
    assert abs(lam.mean() - mean) < 4 * math.sqrt(variance / num_draws)
    squares = np.square(lam - mean)
    assert abs(squares.mean() - variance) < 4 * squares.std() / math.sqrt(num_draws)


@pytest.mark.parametrize(
    ("ratio", "low", "high"),
    [(UniformRatio(0.2, 0.6, True), 0.2, 0.6), (FoldedRatio(BetaRatio(0.3, True)), 0.5, 1.0)],
    ids=["uniform", "folded"],
)
def test_draws_stay_in_their_range(ratio: Any, low: float, high: float) -> None:
    lam = ratio(np.random.default_rng(0), 5000)
    assert low <= lam.min() < low + 0.01
    assert high - 0.01 < lam.max() <= high


def test_folding_takes_the_larger_part_of_the_same_draw() -> None:
    lam = BetaRatio(0.7, True)(np.random.default_rng(3), 9)
    folded = FoldedRatio(BetaRatio(0.7, True))(np.random.default_rng(3), 9)
    assert folded.tolist() == [x if x > 0.5 else 1 - x for x in lam.tolist()]
    assert min(lam) < 0.5


@pytest.mark.parametrize("lam", [0, 0.3, 1.0])
def test_fixed_ratio_draws_nothing(lam: float) -> None:
    rng = np.random.default_rng(0)
    drawn = FixedRatio(lam)(rng, 7)
    assert drawn.dtype == np.float64
    assert drawn.tolist() == [lam]
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
@pytest.mark.parametrize("make", [BetaRatio, UniformRatio], ids=["beta", "uniform"])
def test_whether_rows_have_a_lam_of_their_own_is_known(make: Any, per_sample: bool) -> None:
    ratio = make(per_sample=per_sample)
    for each in (ratio, FoldedRatio(ratio)):
        assert is_by_row(each) is per_sample
        assert each(np.random.default_rng(0), 5).shape == ((5,) if per_sample else (1,))
    assert not is_by_row(FixedRatio(0.2))
    assert is_by_row(SimilarityRatio())


class BetaOf:
    """Keeps the parameters that it is called with, and draws the mean."""

    def beta(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        self.a, self.b = a, b
        return a / (a + b)


HIDDEN = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
OTHERS = torch.tensor([1, 2, 0, 4, 4])  # the last is its own partner


@pytest.mark.parametrize("shape", [(5, 2), (5, 2, 1), (5, 1, 1, 2)], ids=lambda shape: f"{len(shape)}d")
@pytest.mark.parametrize(("tau_max", "tau_std"), [(1.0, 0.5), (2.0, 1.25)])
def test_similar_rows_are_mixed_more_by_the_papers_formula(
    shape: tuple[int, ...], tau_max: float, tau_std: float
) -> None:
    rng: Any = BetaOf()
    SimilarityRatio(tau_max, tau_std)(rng, 5, HIDDEN.view(shape), OTHERS)
    squared = [9 + 16, 4 + 16, 1, 25 + 9, 0]
    mean = sum(squared) / 5
    tau = [tau_max * math.exp(-(d / mean - 1) / (2 * tau_std**2)) for d in squared]
    assert rng.a.tolist() == rng.b.tolist() == pytest.approx(tau, rel=1e-12)


def test_ratios_by_similarity_have_the_variance_of_their_tau() -> None:
    num_draws, rng = 4000, np.random.default_rng(0)
    lam = np.stack([SimilarityRatio(1.0, 0.5)(rng, 5, HIDDEN, OTHERS) for _ in range(num_draws)])
    squared = np.array([25, 20, 1, 34, 0])
    tau = np.exp(-(squared / 16 - 1) / 0.5)
    variance = 1 / (4 * (2 * tau + 1))
    kurtosis = 3 - 6 / (2 * tau + 3)
    standard_error = variance * np.sqrt((kurtosis - 1) / num_draws)
    assert (np.abs(lam.mean(axis=0) - 0.5) < 4 * np.sqrt(variance / num_draws)).all()
    assert (np.abs(np.square(lam - 0.5).mean(axis=0) - variance) < 4 * standard_error).all()


def test_distance_of_complex_rows_counts_both_parts() -> None:
    parts = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([1, 2, 3, 4, 5, 0])
    drawn = [
        SimilarityRatio()(np.random.default_rng(0), 6, rows, partner)
        for rows in (torch.view_as_complex(parts), parts.flatten(1))
    ]
    assert drawn[0].tolist() == pytest.approx(drawn[1].tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(torch.zeros(4, 3), id="all_alike"),
        pytest.param(torch.tensor([0.0, 0.0, 0.0, 1e6])[:, None], id="one_far"),
        pytest.param(torch.arange(4.0), id="one_number_a_row"),
    ],
)
@pytest.mark.parametrize("tau_std", [0.5, 0.01, 100.0])
def test_ratios_by_similarity_are_numbers_in_extreme_cases(hidden: Tensor, tau_std: float) -> None:
    lam = SimilarityRatio(1.0, tau_std)(np.random.default_rng(0), 4, hidden, torch.tensor([1, 0, 3, 2]))
    assert lam.shape == (4,)
    assert ((lam >= 0) & (lam <= 1)).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BetaRatio(1.0, beta=0), ValueError, "beta must be a finite number > 0, got 0. None makes it alpha."),
        (
            lambda: BetaRatio(1.0, beta=True),
            TypeError,
            "beta must be a finite number > 0, got True of type bool. None makes it alpha.",
        ),
        (
            lambda: UniformRatio(low=-0.5),
            ValueError,
            "low must be a number in [0, 1], got -0.5. 1 is the row itself.",
        ),
        (
            lambda: UniformRatio(0.5, 0.25),
            ValueError,
            "high must be a number in [low, 1], got 0.25. 1 is the row itself.",
        ),
        (
            lambda: UniformRatio(per_sample=1),  # type: ignore[arg-type]
            TypeError,
            "per_sample must be True or False, got 1 of type int. False draws one lam for the batch.",
        ),
        (
            lambda: FixedRatio(1.5),
            ValueError,
            "lam must be a number in [0, 1], got 1.5. 1 is the row itself.",
        ),
        (
            lambda: FixedRatio("half"),  # type: ignore[arg-type]
            TypeError,
            "lam must be a number in [0, 1], got 'half' of type str. 1 is the row itself.",
        ),
        (
            lambda: FoldedRatio(BetaRatio),
            TypeError,
            f"ratio must be a function of a numpy.random.Generator and the number of rows, got {BetaRatio!r} of type "
            "type. Give BetaRatio(alpha).",
        ),
        (
            lambda: FoldedRatio(SimilarityRatio()),
            TypeError,
            "ratio must draw without seeing a batch, got SimilarityRatio(tau_max=1.0, tau_std=0.25). Fold "
            "BetaRatio(alpha), say.",
        ),
        (
            lambda: SimilarityRatio(0.0),
            ValueError,
            "tau_max must be a finite number > 0, got 0.0. 1 is the paper's.",
        ),
        (
            lambda: SimilarityRatio(tau_std=math.inf),
            ValueError,
            "tau_std must be a finite number > 0, got inf. 0.25 is the authors' on CIFAR.",
        ),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value.split(" must")[0],
)
def test_settings_out_of_range_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        make()
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("ratio", "alpha", "expected"),
    [
        (BetaRatio(2.0, True), 0.5, BetaRatio(0.5, True)),
        (BetaRatio(2.0, beta=1.0), 0.5, BetaRatio(0.5, beta=0.25)),
        (BetaRatio(2.0, beta=1.0), 0.0, BetaRatio(0.0, beta=1.0)),
        (BetaRatio(0.0), 3.0, BetaRatio(3.0)),
        (FoldedRatio(BetaRatio(1.0)), 4, FoldedRatio(BetaRatio(4))),
        (FoldedRatio(FoldedRatio(BetaRatio(1.0, beta=3.0))), 2, FoldedRatio(FoldedRatio(BetaRatio(2, beta=6.0)))),
    ],
)
def test_alpha_is_changed_with_beta_in_proportion(ratio: Any, alpha: float, expected: Any) -> None:
    assert with_alpha(ratio, alpha) == expected
    assert alpha_of(with_alpha(ratio, alpha)) == alpha


@pytest.mark.parametrize("ratio", [UniformRatio(), FixedRatio(0.5), SimilarityRatio(), FoldedRatio(UniformRatio())])
def test_alpha_of_what_has_none_is_not_changed(ratio: Any) -> None:
    assert alpha_of(ratio) is None
    inner = getattr(ratio, "ratio", ratio)
    message = f"alpha is changed, but the ratio {inner!r} has none. Give ratio=BetaRatio(alpha)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        with_alpha(ratio, 1.0)
