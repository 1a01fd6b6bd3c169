"""Running the trainings of a study, several at a time, each in a process of its own; finished ones are not repeated."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from omegaconf import OmegaConf

from mm_lightning.study.epochs import one_number_of_epochs
from mm_lightning.study.forked import Forked, Forks, Preloaded
from mm_lightning.study.jobs import Job

_ABSENT = "absent"
METRICS, CONFIG, LOG = "metrics.json", "config.yaml", "log.txt"


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(at_once: int) -> int:
    """Return each run's share of the cores."""
    return max(1, num_cores() // at_once)


def run_all(jobs: Sequence[Job], at_once: int, forks: Forks | None = None) -> None:
    """Run what is not finished yet.

    Args:
        jobs: The trainings of the study.
        at_once: Number of processes; each may use its share of the cores.
        forks: Makes the processes, in the place of new ones.

    Raises:
        ValueError: If a finished run was made with other settings than the job's.
        RuntimeError: If a run fails. The runs in progress are finished, no other is begun.
    """
    missing = [job for job in jobs if not is_finished(job)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished, {len(missing)} to go, {at_once} at a time.")
    begin = time.monotonic()
    ends = 0

    def say(ended: Ended) -> None:
        nonlocal ends
        if ended.error is not None:
            raise RuntimeError(
                f"The run {ended.job.name} failed with {ended.error} See {ended.job.folder / LOG}; "
                "what is finished is kept, the same command goes on from there."
            )
        ends += 1
        left = (time.monotonic() - begin) / ends * (len(missing) - ends) / 60  # minutes
        print(f"[{ends}/{len(missing)}] {ended.job.name}  {ended.seconds:.0f} s, about {left:.0f} min left", flush=True)

    run_each(missing, at_once, say, forks=forks)


@dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
        job: Which it was.
        seconds: Wall time.
        error: None after success; else its exit code and last line.
        is_late: Whether it was stopped because it took too long.
    """

    job: Job
    seconds: float
    error: str | None
    is_late: bool = False


def run_each(
    jobs: Sequence[Job],
    at_once: int,
    ended: Callable[[Ended], None],
    *,
    devices: Sequence[str] = (),
    launcher: Sequence[str] = (),
    limit: float | None = None,
    forks: Forks | None = None,
) -> None:
    """Run jobs, each in a process of its own.

    Args:
        jobs: In the order in which they are begun.
        at_once: Number of processes; each may use its share of the cores.
        ended: Told of each run when it has ended. Where it raises a RuntimeError the runs in progress are finished and
            no other is begun; where it raises anything else, and after Ctrl-C and SIGTERM, they are stopped.
        devices: Numbers of the GPUs that the processes are given, one for each of those that run at once.
        launcher: Overrides that choose a launcher of Hydra's, by which each process has its run done.
        limit: Longest time of a run, in seconds, after which it is stopped; None is no limit.
        forks: Makes the processes, in the place of new ones; not with a launcher.
    """
    if not jobs:
        return
    threads = threads_of(at_once)
    processes = _Processes(devices, launcher, None if launcher else forks)
    with ThreadPoolExecutor(at_once) as pool, _sigterm_as_exit():
        try:
            for future in as_completed([pool.submit(processes.run, job, threads, limit) for job in jobs]):
                ended(future.result())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, RuntimeError):
                processes.stop()
                print("Stopped. The finished runs are kept; the same command goes on from there.", file=sys.stderr)
            raise


def is_finished(job: Job) -> bool:
    """Tell whether the job's folder holds the finished run of exactly this job.

    Raises:
        ValueError: If it holds a run with other settings.
    """
    if not (job.folder / METRICS).is_file():
        return False
    made = leaves(OmegaConf.to_container(OmegaConf.load(job.folder / CONFIG)))
    wanted = leaves(composed(job, made.get("run_dir")))  # where it was made: a study may be moved
    differing = [
        key
        for key in {**wanted, **made}
        if made.get(key, _ABSENT) != wanted.get(key, _ABSENT) and not _is_of_data(key, wanted)
    ]
    if differing:
        first = "; ".join(f"{key} is {wanted.get(key, _ABSENT)}, was {made.get(key, _ABSENT)}" for key in differing[:3])
        raise ValueError(
            f"{job.folder} holds a run that {job.command} would not make now ({first}). "
            "Move it away, or choose another folder with out=..."
        )
    return True


def _is_of_data(key: str, wanted: dict[str, Any]) -> bool:
    """Whether a run fills the setting in from its data, as it is left open."""
    return key.startswith("model.") and wanted.get(key) is None


def composed(job: Job, folder: str | Path | None = None) -> dict[str, Any]:
    """Return the configuration of the run that the job would make, resolved.

    Args:
        job: The job.
        folder: Of the run; default is the job's.

    Raises:
        hydra.errors.HydraException: If an override does not fit.
    """
    config = hydra.compose("train", [*job.arguments[:-1], f'run_dir="{folder or job.folder}"'])
    one_number_of_epochs(config, job.arguments)
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def leaves(node: Any, place: str = "") -> dict[str, Any]:
    """Return every value below ``node`` by its dotted place."""
    if not isinstance(node, dict) or not node:
        return {place: node}
    inner = [leaves(value, f"{place}.{key}" if place else str(key)) for key, value in node.items()]
    return {key: value for part in inner for key, value in part.items()}


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; unheard it would leave the runs in progress without a parent."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Processes:
    """Runs jobs in processes, and can stop those in progress."""

    def __init__(self, devices: Sequence[str], launcher: Sequence[str], forks: Forks | None) -> None:
        self._launcher, self._forks = tuple(launcher), forks
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._has_devices = bool(devices)
        self._running: set[subprocess.Popen[bytes] | Forked] = set()
        self._is_stopped = False
        self._lock = threading.Lock()  # no run may begin behind the back of stop()

    def stop(self) -> None:
        """End the runs in progress, and let no other begin."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()

    def run(self, job: Job, threads: int, limit: float | None) -> Ended:
        """Run a job, with what it prints in its folder."""
        if job.folder.exists():  # of a study that was stopped: without metrics.json the run is not finished
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        environment = {"OMP_NUM_THREADS": str(threads)}
        device = self._free.get() if self._has_devices else None
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        parent = None if self._forks is None else self._forks.take(environment)
        begin = time.monotonic()
        try:
            error, is_late = self._run(job, environment, limit, parent)
        finally:
            if device is not None:
                self._free.put(device)
            if self._forks is not None and parent is not None:
                self._forks.give_back(parent)
        return Ended(job, time.monotonic() - begin, error, is_late)

    def _run(
        self, job: Job, environment: dict[str, str], limit: float | None, parent: Preloaded | None
    ) -> tuple[str | None, bool]:
        with self._lock:
            if self._is_stopped:
                return "nothing, for it was not begun.", False
            process = self._begun(job, environment, parent)
            self._running.add(process)
        is_late = False
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            is_late = True
            process.terminate()
            code = process.wait()
        finally:
            with self._lock:
                self._running.discard(process)
        if not code:
            return None, False
        last = (job.folder / LOG).read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit code {code}: {' '.join(last)}", is_late

    def _begun(
        self, job: Job, environment: dict[str, str], parent: Preloaded | None
    ) -> subprocess.Popen[bytes] | Forked:
        log = job.folder / LOG
        if parent is not None:
            return parent.begin(job.arguments, log, environment)
        command = [sys.executable, "-m", "mm_lightning.train", *job.arguments_for(self._launcher)]
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment})
