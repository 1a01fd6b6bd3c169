"""Two processes with sharded weights, FSDP2 and tensor parallelism, and gloo on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import Network, mixed_loss
from torch import Tensor
from torch.testing import assert_close

from mm_lightning import MixPlan

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "train_with_fsdp2.py"

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Steps]]:
    folder = tmp_path_factory.mktemp("fsdp")
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, cwd=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_fsdp_ranks_share_the_layer_and_draw_their_own_partners_and_lam(ranks: list[dict[str, Steps]]) -> None:
    steps = [rank["fsdp"] for rank in ranks]
    assert {step["layer"] for step in steps[0]} == {"input", "first", "second"}
    for first, second in zip(*steps, strict=True):
        assert first["layer"] == second["layer"]
        assert first["lam"][0] != second["lam"][0]
        assert not torch.equal(first["partner"], second["partner"])
        assert not torch.equal(first["x"], second["x"])


def test_fsdp_gradients_are_the_mean_over_both_shards(ranks: list[dict[str, Steps]]) -> None:
    for first, second in zip(*(rank["fsdp"] for rank in ranks), strict=True):
        shards = [_reference_grads(step) for step in (first, second)]
        for name, got in first["grads"].items():
            assert torch.equal(got, second["grads"][name])
            assert_close(got, (shards[0][name] + shards[1][name]) / 2, rtol=0, atol=1e-10)


def test_tensor_parallel_ranks_share_the_whole_plan(ranks: list[dict[str, Steps]]) -> None:
    # They compute one forward pass of one batch together.
    steps = [rank["tensor parallel"] for rank in ranks]
    assert {step["layer"] for step in steps[0]} == {"input", "first", "second"}
    for first, second in zip(*steps, strict=True):
        assert first["layer"] == second["layer"]
        for key in ("x", "y", "partner", "lam"):
            assert torch.equal(first[key], second[key])


def test_tensor_parallel_gradients_are_those_of_one_process(ranks: list[dict[str, Steps]]) -> None:
    for rank in ranks:
        for step in rank["tensor parallel"]:
            assert_close(step["grads"], _reference_grads(step), rtol=0, atol=1e-10)


def _reference_grads(step: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of this rank's mixed loss, where the network is whole; its loss is checked on the way."""
    net = Network()
    net.load_state_dict(step["weights"])
    loss = mixed_loss(net, step["x"], step["y"], MixPlan(step["layer"], step["partner"], step["lam"]))
    assert_close(step["loss"], loss.detach(), rtol=0, atol=1e-10)
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
