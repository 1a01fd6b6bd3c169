"""Two runs of the command: at the same time with a thread each, or one after another with two."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from typing import Any

from bench.command import COMMAND, SMALL, Running
from bench.timing import compare

__all__ = ["measure"]

SEEDS = (0, 1)


def measure(quick: bool) -> dict[str, Any]:
    """Time two trainings of mnist_bottleneck, from the first one's start to the last one's exit."""
    length = ["max_epochs=1", "data.limit=200", SMALL] if quick else ["max_epochs=2"]
    arguments = [*COMMAND, *length, "diagnostics=none", "logger=none"]
    row = compare(
        f"two runs of mnist_bottleneck, {length[0]}",
        {
            "two at a time, one thread each": partial(_at_once, arguments),
            "one after another, two threads": partial(_in_sequence, arguments),
        },
        against="one after another, two threads",
        rounds=1 if quick else 3,
        warmup=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    notes = ["Starting Python and importing, which take one thread, are in both times."]
    if cores == 1:
        notes.append("This machine has one core: two runs at a time share it, and a second thread gains nothing.")
    return {"rows": [row], "notes": notes, "cores": cores}


def _at_once(arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        runs = [_start(arguments, seed, folder, threads=1) for seed in SEEDS]
        try:
            for run in runs:
                run.wait()
        finally:
            for run in runs:
                run.process.kill()  # where the other one failed; one that has ended is left alone
        return time.perf_counter() - begin


def _in_sequence(arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for seed in SEEDS:
            _start(arguments, seed, folder, threads=2).wait()
        return time.perf_counter() - begin


def _start(arguments: list[str], seed: int, folder: str, threads: int) -> Running:
    return Running([*arguments, f"seed={seed}", f"hydra.run.dir=seed-{seed}"], folder, threads)
