"""Two processes with DDP and gloo on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_lightning.mixup import uniform

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "train_on_two_processes.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ddp")
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, capture_output=True, cwd=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_ranks_share_the_layer_and_draw_their_own_partners_and_lam(ranks: list[list[dict[str, Any]]]) -> None:
    assert len(ranks[0]) == 4
    assert {step["layer"] for step in ranks[0]} == {"input", "first"}
    for first, second in zip(*ranks, strict=True):
        assert first["layer"] == second["layer"]
        assert first["lam"][0] != second["lam"][0]
        assert not torch.equal(first["partner"], second["partner"])


def test_gradients_are_the_mean_over_both_shards(ranks: list[list[dict[str, Any]]]) -> None:
    for first, second in zip(*ranks, strict=True):
        shards = [_reference_grads(step) for step in (first, second)]
        for got, again, *wanted in zip(first["grads"], second["grads"], *shards, strict=True):
            assert torch.equal(got, again)
            torch.testing.assert_close(got, sum(wanted) / 2, rtol=0, atol=1e-12)


def test_ways_that_look_at_rows_look_at_those_of_their_rank(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "ways"], check=True, capture_output=True, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert len(ranks[0]) == 4
    for first, second in zip(*ranks, strict=True):
        shards = [_reference_grads_of_ways(step) for step in (first, second)]
        assert first["seed"] != second["seed"]
        for got, again, *wanted in zip(first["grads"], second["grads"], *shards, strict=True):
            assert torch.equal(got, again)
            torch.testing.assert_close(got, sum(wanted) / 2, rtol=0, atol=1e-12)


def _reference_grads_of_ways(step: dict[str, Any]) -> tuple[Tensor, ...]:
    """Nearest partners by a loop, the share of channels that stayed, and half the loss of the unmixed rows."""
    w1, b1, w2, b2 = leaves = [weight.clone().requires_grad_() for weight in step["weights"]]
    x, y = step["x"], step["y"]
    at_layer = x if step["layer"] == "input" else x @ w1.T + b1
    partner = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        partner.append(min(others, key=lambda j: float((at_layer[i] - at_layer[j]).detach().square().sum())))
    assert step["partner"].tolist() == partner
    channels = at_layer.shape[1]
    kept = round(float(step["used_lam"][0]) * channels)
    draws = uniform(step["seed"], (channels,), torch.device("cpu"))
    taken = draws >= draws.sort().values[kept] if kept < channels else torch.zeros(channels, dtype=torch.bool)
    lam = 1 - int(taken.sum()) / channels
    assert abs(float(step["used_lam"][0]) - lam) < 1e-12
    mixed = torch.where(taken, at_layer[partner], at_layer)
    loss = torch.zeros((), dtype=torch.float64)
    for hidden, weight, targets in ((mixed, lam, y), (mixed, 1 - lam, y[partner]), (at_layer, 0.5, y)):
        hidden = hidden @ w1.T + b1 if step["layer"] == "input" else hidden
        loss = loss - weight * (torch.tanh(hidden) @ w2.T + b2).log_softmax(dim=1)[range(8), targets].mean()
    return torch.autograd.grad(loss, leaves)


def _reference_grads(step: dict[str, Any]) -> tuple[Tensor, ...]:
    w1, b1, w2, b2 = leaves = [weight.clone().requires_grad_() for weight in step["weights"]]
    x, y, partner = step["x"], step["y"], step["partner"]
    lam = step["lam"].double()[:, None]
    if step["layer"] == "input":
        x = lam * x + (1 - lam) * x[partner]
    hidden = x @ w1.T + b1
    if step["layer"] == "first":
        hidden = lam * hidden + (1 - lam) * hidden[partner]
    log_probs = (torch.tanh(hidden) @ w2.T + b2).log_softmax(dim=1)
    picked = lam[:, 0] * log_probs[range(8), y] + (1 - lam[:, 0]) * log_probs[range(8), y[partner]]
    return torch.autograd.grad(-picked.mean(), leaves)
