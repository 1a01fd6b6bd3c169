"""The whole command, from the start of its process to its exit, against a straightforward Lightning project."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.profilers import Profiler

from bench.command import COMMAND, Running
from bench.timing import Run, compare
from mm_lightning import diagnostics

__all__ = ["PhaseProfiler", "measure"]

STRAIGHTFORWARD = Path(__file__).with_name("straightforward.py")
QUICK = ["max_epochs=1", "data.limit=1000"]
QUICK += ["diagnostics.confidence_map.resolution=41", "diagnostics.confidence_map.frame_resolution=21"]

START = "process start, imports, configuration, exit"
READING, BUILDING, TRAINING = "reading the data", "building model and trainer", "training steps"
VALIDATION, SAVING, DRAWING, TESTING = "validation", "checkpoints", "diagnostics", "testing"


def measure(quick: bool) -> dict[str, Any]:
    """Time both to their finished pictures, and then see where one run of the command spends its time."""
    length = QUICK if quick else []
    sides: dict[str, Run] = {"mm_lightning.train": partial(_command_seconds, length)}
    for workers in (0, 2):
        arguments = ["--workers", str(workers), *["--max-epochs", "1"] * quick]
        sides[f"straightforward project, {workers} workers"] = partial(_project_seconds, arguments)
    row = compare(
        "mnist_bottleneck, one epoch" if quick else "mnist_bottleneck, 14 epochs",
        sides,
        against="straightforward project, 0 workers",
        rounds=1 if quick else 2,
        targets={} if quick else {"mm_lightning.train": 0.5},
        warmup=False,
    )
    notes = [
        "The straightforward project draws one picture, the command three diagnostics over the epochs and at the end.",
        "The parts are of one further run of the command, with a clock in Lightning's hooks.",
    ]
    if quick:
        notes.append("Quick runs do unlike work: the command trains on 1,000 images, the project on 50,000.")
    return {"rows": [row], "parts": phases(length), "notes": notes}


def phases(length: list[str]) -> list[dict[str, Any]]:
    """Run the command once more; return its phases with their seconds and their share of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder, "phases.json")
        profiler = ["+trainer.profiler._target_=bench.end_to_end.PhaseProfiler", f"+trainer.profiler.path={clock}"]
        whole = _command_seconds([*length, *profiler], folder, path=(Path(__file__).parent.parent,))
        in_trainer: dict[str, float] = json.loads(clock.read_text())
        in_run: float = json.loads(Path(folder, "run", "metrics.json").read_text())["total_seconds"]
    # Before there is a Trainer, the run has built the model; after it, written its metrics.
    in_trainer[BUILDING] += in_run - sum(in_trainer.values())
    seconds = {START: whole - in_run, **in_trainer}
    return [
        {"part": part, "seconds": round(seconds.get(part, 0.0), 3), "share": round(seconds.get(part, 0.0) / whole, 4)}
        for part in (START, READING, BUILDING, TRAINING, VALIDATION, SAVING, DRAWING, TESTING)
    ]


def _command_seconds(length: list[str], folder: str | None = None, path: tuple[Path, ...] = ()) -> float:
    return _seconds([*COMMAND, *length, "hydra.run.dir=run"], folder, path)


def _project_seconds(arguments: list[str]) -> float:
    return _seconds([sys.executable, str(STRAIGHTFORWARD), "--folder", ".", *arguments])


def _seconds(arguments: list[str], folder: str | None = None, path: tuple[Path, ...] = ()) -> float:
    """Seconds of a process, in ``folder`` or in one of its own."""
    if folder is None:
        with tempfile.TemporaryDirectory() as own:
            return _seconds(arguments, own, path)
    begin = time.perf_counter()
    Running(arguments, folder, path=path).wait()
    return time.perf_counter() - begin


class PhaseProfiler(Profiler):
    """Sorts all the time since it was made into phases, and writes them when a stage of the Trainer ends.

    Time belongs to the innermost hook that has a phase of its own (a diagnostic's, a checkpoint's, the data's), and
    otherwise to what the Trainer is about: it trains, validates or tests.

    Args:
        path: The JSON file: seconds by phase.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.seconds: defaultdict[str, float] = defaultdict(float, {BUILDING: 0.0})
        self.stage_phase = BUILDING
        self.own: list[str | None] = []  # of the actions that are going on, outermost first
        self.since = time.perf_counter()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begin a stage of the Trainer: fit or test."""
        super().setup(stage, local_rank, log_dir)
        self._count()
        if stage == "test":
            self.stage_phase = TESTING

    def start(self, action_name: str) -> None:
        """Count the time before an action."""
        self._count()
        if action_name == "run_training_epoch":
            self.stage_phase = TRAINING
        elif action_name.endswith(".on_validation_start"):
            self.stage_phase = VALIDATION
        self.own.append(_phase_of(action_name))

    def stop(self, action_name: str) -> None:
        """Count the time since then."""
        self._count()
        self.own.pop()
        if action_name.startswith("[Strategy]") and action_name.endswith(".on_validation_end"):  # the last hook of it
            self.stage_phase = TRAINING

    def describe(self) -> None:
        """Write the phases."""
        self._count()
        self.path.write_text(json.dumps(self.seconds))

    def _count(self) -> None:
        now = time.perf_counter()
        phase = next((own for own in reversed(self.own) if own), self.stage_phase)
        self.seconds[phase] += now - self.since
        self.since = now


def _phase_of(action: str) -> str | None:
    """The phase that an action of Lightning has wherever it happens; None if it is part of what goes on."""
    if action.startswith("[LightningDataModule]") and action.endswith((".setup", ".prepare_data")):
        return READING
    if action == "save_checkpoint" or action.startswith("[Callback]ModelCheckpoint"):
        return SAVING
    if action.startswith(tuple(f"[Callback]{name}" for name in diagnostics.__all__)):
        return DRAWING
    return None
