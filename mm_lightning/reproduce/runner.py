"""Running the trainings of a study, several at a time, each in a process of its own; finished ones are not repeated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import hydra
from omegaconf import OmegaConf

from mm_lightning.reproduce.plan import Job

METRICS, CONFIG, LOG = "metrics.json", "config.yaml", "log.txt"


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Run what is not finished yet.

    Args:
        jobs: The trainings of the study.
        at_once: Number of processes; each may use its share of the cores.

    Raises:
        ValueError: If a finished run was made with other settings than the job's.
        RuntimeError: If a run fails. The runs in progress are finished, no other is begun.
    """
    missing = [job for job in jobs if not is_finished(job)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished, {len(missing)} to go, {at_once} at a time.")
    if not missing:
        return
    threads = max(1, num_cores() // at_once)
    begin = time.monotonic()
    with _Processes() as processes, ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(processes.run, job, threads) for job in missing]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                job, seconds = future.result()
                left = (time.monotonic() - begin) / done * (len(missing) - done)
                print(
                    f"[{done}/{len(missing)}] {job.name}  {seconds:.0f} s, about {left / 60:.0f} min left", flush=True
                )
        except RuntimeError:
            pool.shutdown(cancel_futures=True)  # waits for the runs in progress
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_finished(job: Job) -> bool:
    """Tell whether the job's folder holds the finished run of exactly this job.

    Raises:
        ValueError: If it holds a run with other settings.
    """
    if not (job.folder / METRICS).is_file():
        return False
    made, wanted = OmegaConf.to_container(OmegaConf.load(job.folder / CONFIG)), composed(job)
    differing = sorted(key for key in {**wanted, **made} if made.get(key) != wanted.get(key))
    if differing:
        raise ValueError(
            f"{job.folder} holds a run with another {', '.join(differing)} than {job.command!r} has now. "
            "Move it away, or choose another folder with out=..."
        )
    return True


def composed(job: Job) -> dict[str, Any]:
    """Return the configuration of the run that the job would make, resolved.

    Raises:
        hydra.errors.HydraException: If an override does not fit.
    """
    config = hydra.compose("train", [*job.arguments[:-1], f'run_dir="{job.folder}"'])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


class _Processes:
    """The processes that run now; whatever ends the block ends them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in list(self._running):
            process.terminate()

    def run(self, job: Job, threads: int) -> tuple[Job, float]:
        """Run a job, with what it prints in its folder."""
        begin = time.monotonic()
        if job.folder.exists():  # of a study that was stopped: without metrics.json the run is not finished
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "mm_lightning.train", *job.arguments]
        with (job.folder / LOG).open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        if code:
            last = (job.folder / LOG).read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(
                f"The run {job.name} failed with exit code {code}: {' '.join(last)} See {job.folder / LOG}; "
                "what is finished is kept, the same command goes on from there."
            )
        return job, time.monotonic() - begin
