"""Diagnostics with DDP and gloo on two processes on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "scripts" / "diagnose_on_two_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, cwd=folder)
    assert done.returncode == 0, done.stderr.decode()
    (folder / "stderr.txt").write_bytes(done.stderr)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_every_process_sees_the_rows_of_all(ranks: list[dict[str, Any]]) -> None:
    (inputs, targets), state = ranks[0]["data"], ranks[0]["state"]
    first = inputs @ state["first.weight"].T + state["first.bias"]
    want = {
        "input": inputs,
        "first": first,
        # not the losses of single rows that validation_step returns
        "output": torch.tanh(first) @ state["head.weight"].T + state["head.bias"],
        "targets": targets,
    }
    for val, train in (rank["seen"] for rank in ranks):
        assert (val["split"], train["split"]) == ("val", "train")
        # rank zero has every second row, rank one the others
        order = [*range(0, 64, 2), *range(1, 64, 2)]
        for name, states in want.items():
            assert_close(val[name], states[order])
        # twelve of each rank, in the order of a loader that Lightning shuffles
        places = [int((row == inputs).all(dim=1).nonzero()) for row in train["input"]]
        assert len(set(places)) == 24
        for name, states in want.items():
            assert_close(train[name], states[places])
    assert torch.equal(ranks[0]["seen"][1]["input"], ranks[1]["seen"][1]["input"])


def test_every_process_has_the_numbers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for split, seen in zip(("val", "train"), rank["seen"], strict=True):
            assert rank["metrics"][f"{split}/spy/power"] == pytest.approx(float(seen["first"].square().mean()))


def test_rank_zero_draws(folder: Path) -> None:
    names = {
        f"{name}.{ending}" for name in ("spy_val", "spy_train", "mixup_monitor_epoch") for ending in ("png", "npz")
    }
    assert {path.name for path in (folder / "figures").iterdir()} == names
    for split in ("val", "train"):
        with np.load(folder / "figures" / f"spy_{split}.npz") as arrays:
            assert arrays["rank"] == 0


def test_the_monitor_draws_rank_zero_and_logs_the_mean_of_all(folder: Path, ranks: list[dict[str, Any]]) -> None:
    losses = defaultdict(list)
    for rank in ranks:
        for layer, _, loss in rank["batches"]:
            losses[layer].append(loss)
    assert set(losses) == {"input", "first"}
    for rank in ranks:
        for layer, all_losses in losses.items():
            assert rank["metrics"][f"mixup/loss_at/{layer}"] == pytest.approx(np.mean(all_losses))
    own, others = ([lam for _, lam, _ in rank["batches"]] for rank in ranks)
    assert own != others
    with np.load(folder / "figures" / "mixup_monitor_epoch.npz") as arrays:
        assert arrays["lam"].tolist() == own


def test_lightning_has_nothing_to_remark(folder: Path) -> None:
    assert "sync_dist" not in (folder / "stderr.txt").read_text()
