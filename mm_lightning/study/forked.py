"""Runs as forks of processes that have their imports behind them; see ``mm_lightning.command.preloaded``."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Forked", "Forks", "Preloaded"]


class Forks:
    """Processes that runs are forked from, as many as run at a time; to be closed.

    Only for Linux: elsewhere the libraries that torch uses do not stand it.
    """

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Preloaded] = queue.SimpleQueue()

    @staticmethod
    def of_this_machine() -> Forks | None:
        """Return them, or None where there can be none."""
        return Forks() if sys.platform == "linux" else None

    def take(self, environment: Mapping[str, str]) -> Preloaded:
        """Return one that is free, or a new one with this environment besides one's own; waits for its imports."""
        with suppress(queue.Empty):
            while (free := self._free.get_nowait()).is_gone:
                free.close()
            return free
        return Preloaded({**os.environ, **environment})

    def give_back(self, process: Preloaded) -> None:
        """Take one back whose run has ended."""
        self._free.put(process)

    def close(self) -> None:
        """End those that are free."""
        with suppress(queue.Empty):
            while True:
                self._free.get_nowait().close()


class Preloaded:
    """A process that makes runs, one at a time.

    Args:
        environment: Of the process; variables that are read when torch is imported must be in it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "mm_lightning.command.preloaded"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment), bufsize=0
        )
        self._answer()

    @property
    def is_gone(self) -> bool:
        """Whether it has ended without being told to, as of a lack of memory."""
        return self._process.poll() is not None

    def begin(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked:
        """Begin a run.

        Args:
            arguments: Of ``python -m mm_lightning.train``.
            log: File for what it prints.
            environment: What it has besides that of the process.

        Raises:
            RuntimeError: If the process is gone.
        """
        assert self._process.stdin is not None
        line = {"arguments": list(arguments), "log": str(log), "environment": dict(environment)}
        with suppress(BrokenPipeError):  # what has become of it is told by its answer
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
        return Forked(self._answer(), self._process)

    def close(self) -> None:
        """End the process, whose run has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _gone(self._process)
        return int(line)


class Forked:
    """A run, with what ``subprocess.Popen`` has to wait for it and to end it."""

    def __init__(self, number: int, parent: subprocess.Popen[bytes]) -> None:
        self._number, self._parent = number, parent

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: If it is not there after so many seconds.
            RuntimeError: If the process that the run was forked from is gone; the run is ended, too.
        """
        assert self._parent.stdout is not None
        if not select.select([self._parent.stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("mm_lightning.train", timeout or 0.0)
        line = self._parent.stdout.readline()
        if not line:
            self.terminate()  # nobody would hear of its end
            raise _gone(self._parent)
        return int(line)

    def terminate(self) -> None:
        """Ask it to end."""
        with suppress(ProcessLookupError):
            os.kill(self._number, signal.SIGTERM)


def _gone(process: subprocess.Popen[bytes]) -> RuntimeError:
    return RuntimeError(
        f"The process that runs are forked from has ended, with exit code {process.wait()}. What is finished is kept; "
        "the same command goes on from there."
    )
