from __future__ import annotations

import pytest
import torch

from mm_lightning.evaluation import neighbour_accuracy

# on a line: classes 7 7 3 3 3 at 0 1 3 4 5
BANK = torch.tensor([[0.0], [1.0], [3.0], [4.0], [5.0]])
CLASSES = torch.tensor([7, 7, 3, 3, 3])


@pytest.mark.parametrize(
    ("place", "k", "chosen"),
    [(0.2, 1, 7), (2.4, 1, 3), (0.2, 3, 7), (1.9, 3, 7), (1.9, 2, 7), (2.1, 2, 3), (0.2, 5, 3)],
)
def test_the_most_frequent_class_of_the_nearest_is_chosen_by_hand(place: float, k: int, chosen: int) -> None:
    hidden = torch.tensor([[place]])
    for target in (3, 7):
        got = neighbour_accuracy(BANK, CLASSES, hidden, torch.tensor([target]), k, cosine=False)
        assert got == float(chosen == target)


def test_equal_votes_go_to_the_nearest() -> None:
    # at 1.9 the nearest four are 1 3 0 4: classes 7 3 7 3
    got = neighbour_accuracy(BANK, CLASSES, torch.tensor([[1.9]]), torch.tensor([7]), 4, cosine=False)
    assert got == 1.0


def test_the_cosine_does_not_see_lengths() -> None:
    bank, classes = torch.tensor([[1.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1])
    hidden, targets = torch.tensor([[50.0, 1.0], [0.01, 0.02]]), torch.tensor([0, 1])
    assert neighbour_accuracy(bank, classes, hidden, targets, 1) == 1.0
    assert neighbour_accuracy(bank, classes, hidden, targets, 1, cosine=False) == 0.5


@pytest.mark.parametrize("cosine", [True, False])
def test_chunks_agree_with_a_loop(cosine: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    bank, classes = torch.randn(40, 3, generator=rng), torch.randint(4, (40,), generator=rng)
    hidden, targets = torch.randn(30, 3, generator=rng), torch.randint(4, (30,), generator=rng)
    right = 0
    for row, target in zip(hidden.double(), targets.tolist(), strict=True):
        other = bank.double()
        near = -(other @ row) / other.norm(dim=1) if cosine else (other - row).norm(dim=1)
        nearest = classes[near.argsort()[:5]].tolist()
        most = max(nearest.count(k) for k in nearest)
        right += next(k for k in nearest if nearest.count(k) == most) == target
    assert 0 < right < 30
    for chunk in (1, 70, 10_000):
        got = neighbour_accuracy(bank, classes, hidden, targets, 5, cosine, chunk)
        assert got == pytest.approx(right / 30)


def test_near_rows_far_from_zero_are_told_apart() -> None:
    bank = torch.tensor([[10_000.0], [10_000.01]])
    for place, chosen in ((10_000.0, 0), (10_000.01, 1)):
        got = neighbour_accuracy(
            bank, torch.tensor([0, 1]), torch.tensor([[place]]), torch.tensor([chosen]), 1, cosine=False
        )
        assert got == 1.0


def test_misuse_is_named() -> None:
    hidden, targets = torch.tensor([[1.0]]), torch.tensor([7])
    with pytest.raises(ValueError, match="k must be at most the 5 rows of the bank, got 6"):
        neighbour_accuracy(BANK, CLASSES, hidden, targets, 6)
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        neighbour_accuracy(BANK, CLASSES, hidden, targets, 0)
    with pytest.raises(ValueError, match="as wide, got 1 and 2"):
        neighbour_accuracy(BANK, CLASSES, torch.zeros(1, 2), targets)
    with pytest.raises(ValueError, match=r"hidden must be \(N, D\) and targets \(N,\)"):
        neighbour_accuracy(BANK, CLASSES[:2], hidden, targets)
