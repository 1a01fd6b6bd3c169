import numpy as np
import pytest
import torch

from mm_lightning.evaluation.scores import Reliability, reliability
from mm_lightning.study.reliabilities import draw_reliability_of_methods, pooled


def _bins(seed: int, rows: int = 50, num_bins: int = 8) -> tuple[torch.Tensor, torch.Tensor, Reliability]:
    rng = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(rows, 3, generator=rng, dtype=torch.float64).softmax(dim=1)
    targets = torch.randint(3, (rows,), generator=rng)
    return probabilities, targets, reliability(probabilities, targets, num_bins)


def test_pooled_bins_are_those_of_all_rows():
    runs = [_bins(seed, rows) for seed, rows in ((0, 40), (1, 7), (2, 90))]
    want = reliability(torch.cat([run[0] for run in runs]), torch.cat([run[1] for run in runs]), 8)
    assert np.isnan(runs[1][2].accuracy).sum() > np.isnan(want.accuracy).sum() > 0  # some are empty in one, some in all
    for got, expected in zip(pooled([run[2] for run in runs]), want, strict=True):
        np.testing.assert_allclose(got, expected)


def test_other_bins_are_refused():
    with pytest.raises(ValueError, match=r"the same bins, got \[8, 4\] bins"):
        pooled([_bins(0)[2], _bins(0, num_bins=4)[2]])


@pytest.mark.parametrize(("methods", "rows"), [(1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (6, [3, 3])])
def test_at_most_three_stand_in_a_row(methods: int, rows: list[int]):
    diagrams = {f"method {k}": _bins(k, 10 ** (1 + k % 3))[2] for k in range(methods)}
    numbers = {title: {"ece": 0.25} for title in diagrams}
    axes = draw_reliability_of_methods(diagrams, numbers).axes
    uppers, lowers = axes[::2], axes[1::2]
    if uppers[0].get_title("left") == "":
        uppers, lowers = lowers, uppers
    assert [each.get_title("left") for each in uppers] == list(diagrams)
    heights = [round(each.get_position().y0, 6) for each in uppers]
    assert [heights.count(height) for height in sorted(set(heights), reverse=True)] == rows
    assert len({each.get_ylim() for each in lowers}) == 1  # of the most rows of all
    assert {each.texts[0].get_text() for each in lowers} == {"0.250"}
