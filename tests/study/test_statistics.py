"""Paired differences, against numbers worked out by hand and simulated studies of which the truth is known."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from mm_lightning.study.statistics import PairedComparison, compare_paired


@pytest.mark.parametrize(
    ("differences", "mean", "variance", "critical"),
    [
        ([0.1, 0.2, 0.6], 0.3, (0.04 + 0.01 + 0.09) / 2, 4.302653),
        ([1.0, 2.0, 4.0, 4.0, 9.0], 4.0, (9 + 4 + 0 + 0 + 25) / 4, 2.776445),
    ],
    ids=["3 seeds", "5 seeds"],
)
def test_interval_is_that_of_the_textbook(
    differences: list[float], mean: float, variance: float, critical: float
) -> None:
    found = compare_paired(differences, "higher")
    assert found.difference == pytest.approx(mean)
    assert found.half_width == pytest.approx(critical * math.sqrt(variance / len(differences)), rel=1e-6)
    assert found.deviation == pytest.approx(math.sqrt(variance))
    assert found.seeds == len(differences)


@pytest.mark.parametrize(
    ("differences", "better", "margin", "outcome"),
    [
        ([1.0, 2.0, 3.0, 2.0, 2.0], "higher", None, "better"),  # 2 ± 0.88
        ([1.0, 2.0, 3.0, 2.0, 2.0], "lower", None, "worse"),
        ([-1.0, -2.0, -3.0, -2.0, -2.0], "lower", None, "better"),
        ([1.0, 2.0, 3.0], "higher", None, "not distinguishable"),  # 2 ± 2.48, though better in every seed
        ([1.0, 2.0, 3.0], "higher", 4.4, "not distinguishable"),
        ([1.0, 2.0, 3.0], "higher", 4.5, "no difference"),
        ([-1.0, -2.0, -3.0], "higher", 4.4, "not distinguishable"),
        ([-1.0, -2.0, -3.0], "higher", 4.5, "no difference"),
        ([1.0, 2.0, 3.0, 2.0, 2.0], "higher", 9.0, "better"),  # small, yet there
        ([0.0, 0.0], "lower", None, "no difference"),
        ([0.3 - 0.2, 0.2 - 0.1, 0.1], "higher", None, "not distinguishable"),  # without spread
        ([5.0], "higher", 9.0, "not distinguishable"),
        ([0.0], "higher", 9.0, "not distinguishable"),
    ],
)
def test_outcome_is_where_the_interval_is(
    differences: list[float], better: str, margin: float | None, outcome: str
) -> None:
    assert compare_paired(differences, better, margin).outcome == outcome


def test_no_interval_is_made_up() -> None:
    assert compare_paired([0.0, 0.0, 0.0], "higher") == PairedComparison(0.0, 0.0, 3, 0.0, "no difference")
    assert compare_paired([5.0], "higher") == PairedComparison(5.0, None, 1, None, "not distinguishable")
    assert compare_paired([5.0, 5.0], "higher") == PairedComparison(5.0, None, 2, 0.0, "not distinguishable")


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (30.0, 2), (0.08, None)])
def test_seeds_needed_are_those_of_published_tables(effect: float, seeds: int | None) -> None:
    # e.g. Cohen's small, medium and large effect, paired t-test, two-sided 5 %, power 80 %: 199, 34 and 15
    for sign in (1, -1):
        assert compare_paired([sign * effect - 1, sign * effect, sign * effect + 1], "higher").seeds_needed == seeds
    assert all(
        compare_paired(one, "higher").seeds_needed is None for one in ([1.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 1.0])
    )


def test_of_a_thousand_studies_without_a_difference_one_in_twenty_is_called_different() -> None:
    rng = np.random.default_rng(0)
    found = [compare_paired(list(rng.normal(size=5)), "higher", margin=0.5).outcome for _ in range(1000)]
    different = found.count("better") + found.count("worse")
    # 5 % of 1,000 are 50; of a binomial(1000, 0.05), 66 are exceeded and 34 fallen short of once in a hundred each
    assert 34 <= different <= 66
    assert min(found.count("better"), found.count("worse")) >= 10


def test_of_a_thousand_studies_as_large_as_said_four_in_five_find_the_difference() -> None:
    rng = np.random.default_rng(0)
    for effect, seeds in ((1.0, 10), (0.5, 34)):
        found = [compare_paired(list(rng.normal(effect, 1, size=seeds)), "higher").outcome for _ in range(1000)]
        # three standard errors of 80 % of 1,000 are 3.8 points
        assert found.count("better") / 1000 == pytest.approx(0.8, abs=0.038)


def test_few_test_rows_make_no_difference_out_of_ties() -> None:
    rng = np.random.default_rng(0)  # one row more or less is right, in both seeds alike in two of nine studies
    studies = [list(rng.choice([-1.0, 0.0, 1.0], size=2) / 54) for _ in range(1000)]
    assert {compare_paired(study, "higher").outcome for study in studies} == {"no difference", "not distinguishable"}


def test_what_cannot_be_judged_is_refused() -> None:
    for differences in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"differences must be finite, one for each seed, got \[.*\]\. Leave out"):
            compare_paired(differences, "higher")
    with pytest.raises(ValueError, match=r"margin must be >= 0, got -1\. None is for measures without one\."):
        compare_paired([1.0, 2.0], "higher", -1)


def test_without_scipy_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert compare_paired([1.0], "higher").seeds == 1
    with pytest.raises(
        ImportError, match=r"^Differences are judged with scipy: pip install 'mm-lightning\[report\]'\.$"
    ):
        compare_paired([1.0, 2.0], "higher")
