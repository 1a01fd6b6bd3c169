"""Runs as forks of a process that has its imports behind it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_lightning.study.forked import Forks, Preloaded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux alone"),
]
WORDS = ["data=spirals", "data.num_points=60", "model=mlp", "max_epochs=1", "mixup=none", "logger=none"]


@pytest.fixture(scope="module")
def parent() -> Iterator[Preloaded]:
    forks = Forks()
    process = forks.take({"OMP_NUM_THREADS": "1"})
    yield process
    forks.give_back(process)
    forks.close()


def test_a_forked_run_measures_what_a_process_of_its_own_does(parent: Preloaded, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "forked", tmp_path / "own"
    run = parent.begin([*WORDS, f"hydra.run.dir={ours}"], tmp_path / "log.txt", {})
    assert run.wait() == 0
    command = [sys.executable, "-m", "mm_lightning.train", *WORDS, f"hydra.run.dir={theirs}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (ours, theirs)]
    assert metrics[0] == metrics[1]
    assert "epoch   1/1" in (tmp_path / "log.txt").read_text()


def test_a_failure_is_an_exit_code_and_a_line(parent: Preloaded, tmp_path: Path) -> None:
    run = parent.begin(["model=nothing", f"hydra.run.dir={tmp_path}/run"], tmp_path / "log.txt", {})
    assert run.wait() == 1
    assert (tmp_path / "log.txt").read_text().startswith("error: There is no 'model/nothing'.")


def test_a_run_can_be_waited_for_and_ended(parent: Preloaded, tmp_path: Path) -> None:
    words = [*WORDS, "max_epochs=100000", "data.num_points=600", f"hydra.run.dir={tmp_path}/run"]
    run = parent.begin(words, tmp_path / "log.txt", {})
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(1.0)
    run.terminate()
    assert run.wait(60) != 0
    again = parent.begin([*WORDS, f"hydra.run.dir={tmp_path}/next"], tmp_path / "next.txt", {})
    assert again.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_leaves_the_parent_to_tell_of_the_run_s_end(
    parent: Preloaded, tmp_path: Path, number: int
) -> None:
    words = [*WORDS, "max_epochs=100000", "data.num_points=600", f"hydra.run.dir={tmp_path}/run"]
    run = parent.begin(words, tmp_path / "log.txt", {})
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(1.0)
    parent._process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(0.5)
    run.terminate()
    assert run.wait(60) in (143, -signal.SIGTERM)
    assert not parent.is_gone


def test_a_parent_that_is_gone_is_said(tmp_path: Path) -> None:
    process = Preloaded({**os.environ})
    process.close()
    with pytest.raises((RuntimeError, ValueError)):
        process.begin(WORDS, tmp_path / "log.txt", {})


def test_a_parent_that_was_killed_ends_the_study_not_the_method(tmp_path: Path) -> None:
    forks = Forks()
    process = forks.take({**os.environ})
    run = process.begin([*WORDS, "max_epochs=100000", f"hydra.run.dir={tmp_path}/run"], tmp_path / "log.txt", {})
    process._process.kill()
    with pytest.raises(RuntimeError, match=r"^The process that runs are forked from has ended, with exit code -9\."):
        run.wait()
    forks.give_back(process)
    after = forks.take({**os.environ})
    assert after is not process
    after.close()
