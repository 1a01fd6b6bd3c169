from __future__ import annotations

import math

import pytest
import torch

from mm_lightning.evaluation import calibration_numbers, reliability, scores


def test_scores_of_five_rows_by_hand() -> None:
    # confidences 0.5 | 0.6 0.7 0.9 1.0, of which the first, the third and the last are right
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0], [0.1, 0.7, 0.2], [0, 0.1, 0.9], [1, 0, 0]]).double()
    targets = torch.tensor([0, 1, 1, 1, 0])
    got = scores(probabilities.log(), targets, num_bins=2)
    assert got == pytest.approx(
        {
            "acc": 3 / 5,
            "nll": -math.log(0.5 * 0.4 * 0.7 * 0.1 * 1.0) / 5,
            "ece": 1 / 5 * 0.5 + 4 / 5 * 0.3,
            "mce": 0.5,
            "brier": (0.38 + 0.72 + 0.14 + 1.62 + 0) / 5,
            "overconfidence": (0.5 + 0.6 + 0.7 + 0.9 + 1.0) / 5 - 3 / 5,
        },
        rel=1e-6,
    )


def test_scores_are_those_of_the_bins() -> None:
    rng = torch.Generator().manual_seed(0)
    log_probabilities = (2 * torch.randn(200, 4, generator=rng)).log_softmax(dim=1)
    targets = torch.randint(4, (200,), generator=rng)
    got = scores(log_probabilities, targets)
    bins = reliability(log_probabilities.double().exp(), targets, 15)
    want = calibration_numbers(bins, log_probabilities, targets)
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-12)
    assert got["acc"] == (log_probabilities.argmax(dim=1) == targets).sum().item() / 200


def test_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be >= 0 and sum to 1 in each row, got .* Are they logits"):
        scores(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="num_bins must be an integer >= 1, got 0"):
        scores(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), num_bins=0)
