"""Runs in processes of their own: finished ones are kept, failures named."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from mm_lightning.command.configuration import CONF
from mm_lightning.study import runner
from mm_lightning.study.jobs import Job


@pytest.fixture(autouse=True)
def hydra_is_there() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def job(folder: Path, *overrides: str, seed: int = 0) -> Job:
    return Job("spiral", "baseline", "default", seed, ("mixup=none", *overrides), folder / f"seed{seed}")


def finish(one: Job) -> None:
    one.folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(runner.composed(one)), one.folder / "config.yaml")
    (one.folder / "metrics.json").write_text("{}")


def fake_training(monkeypatch: pytest.MonkeyPatch, script: str) -> list[list[str]]:
    """Let a script run in the place of the training; it finds its folder in ``folder``."""
    calls: list[list[str]] = []
    popen = runner.subprocess.Popen

    def start(command: list[str], **settings: Any) -> Any:
        calls.append(command)
        folder = command[-1].removeprefix('hydra.run.dir="').removesuffix('"')
        return popen(
            [sys.executable, "-c", f"import os, pathlib, sys\nfolder = pathlib.Path({folder!r})\n{script}"], **settings
        )

    monkeypatch.setattr(runner.subprocess, "Popen", start)
    return calls


def test_only_what_is_missing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = fake_training(monkeypatch, "(folder / 'metrics.json').write_text(os.environ['OMP_NUM_THREADS'])")
    jobs = [job(tmp_path, seed=seed) for seed in range(3)]
    finish(jobs[1])
    (jobs[2].folder / "checkpoints").mkdir(parents=True)  # left by a run that was stopped
    runner.run_all(jobs, at_once=2)
    assert sorted(call[-2:] for call in calls) == [
        ["callbacks=last", f'hydra.run.dir="{jobs[k].folder}"'] for k in (0, 2)
    ]
    assert sorted(call[-3] for call in calls) == ["seed=0", "seed=2"]
    assert calls[0][:5] == [sys.executable, "-m", "mm_lightning.train", "+experiment=spiral", "mixup=none"]
    assert (jobs[0].folder / "metrics.json").read_text() == str(max(1, runner.num_cores() // 2))
    assert not (jobs[2].folder / "checkpoints").exists()
    printed = capfd.readouterr().out
    assert "1 of 3 runs are finished, 2 to go, 2 at a time" in printed
    assert "[2/2] spiral baseline default seed" in printed


def test_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    finish(job(tmp_path))
    assert runner.is_finished(job(tmp_path))
    with pytest.raises(ValueError, match=r"would not make now \(.*max_epochs is 2, was 16"):
        runner.is_finished(job(tmp_path, "max_epochs=2"))


def test_what_a_run_has_filled_in_from_its_data_is_no_other_setting(tmp_path: Path) -> None:
    finish(job(tmp_path))
    config = OmegaConf.load(job(tmp_path).folder / "config.yaml")
    OmegaConf.update(config, "model.num_classes", 2, force_add=True)
    OmegaConf.save(config, job(tmp_path).folder / "config.yaml")
    assert runner.is_finished(job(tmp_path))
    OmegaConf.update(config, "model.blocks.negative_slope", 0.1)
    OmegaConf.save(config, job(tmp_path).folder / "config.yaml")
    with pytest.raises(ValueError, match=r"would not make now \(model.blocks.negative_slope is 0.3, was 0.1"):
        runner.is_finished(job(tmp_path))


def test_failure_is_named_and_what_is_finished_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "print('error: no room')\nif 'seed1' in str(folder): sys.exit(3)\n(folder / 'metrics.json').write_text('{}')"
    )
    calls = fake_training(monkeypatch, script)
    jobs = [job(tmp_path, seed=seed) for seed in range(4)]
    with pytest.raises(
        RuntimeError, match=r"spiral baseline default seed 1 failed with exit code 3: error: no room See .*log\.txt"
    ):
        runner.run_all(jobs, at_once=1)
    assert (jobs[0].folder / "metrics.json").is_file()
    assert (jobs[1].folder / "log.txt").read_text() == "error: no room\n"
    assert len(calls) < 4
    assert not jobs[3].folder.exists()


def raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def terminate_oneself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


@pytest.mark.parametrize(
    ("interrupt", "expected"),
    [(raise_keyboard_interrupt, KeyboardInterrupt), (terminate_oneself, SystemExit)],
    ids=["ctrl-c", "sigterm"],
)
def test_interruption_ends_the_runs(
    interrupt: Callable[[], None], expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import time; (folder / 'begun').write_text(str(os.getpid())); time.sleep(60)"
    fake_training(monkeypatch, script)
    begun = tmp_path / "seed0" / "begun"

    def wait_and_interrupt(futures: object) -> None:
        while not begun.exists() or not begun.read_text():
            time.sleep(0.01)
        interrupt()

    monkeypatch.setattr(runner, "as_completed", wait_and_interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(expected):
        runner.run_all([job(tmp_path), job(tmp_path, seed=1)], at_once=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)  # it was waited for, so nothing is left of it
    assert not (tmp_path / "seed1" / "begun").exists()
    assert signal.getsignal(signal.SIGTERM) is before
