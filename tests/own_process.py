"""Commands in processes of their own that need not wait for imports: forks of one that has them behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

SERVER = Path(__file__).parent / "scripts" / "command_server.py"
THREADS = {"OMP_NUM_THREADS": "1"}
LONGEST = 900.0  # seconds, after which a command is killed


class Running:
    """``python -m MODULE WORD ...``, but that its imports are not its own: what they print or read is not seen.

    Args:
        module: Name of the module.
        *words: What follows it on the command line.
        cwd: Where it runs.
        **environment: What it has besides this process's.
    """

    def __init__(self, module: str, *words: object, cwd: Path, **environment: str) -> None:
        self._err = TemporaryFile("w+")  # noqa: SIM115
        out, account = os.pipe(), os.pipe()
        job = {"words": [module, *map(str, words)], "cwd": str(cwd), "environment": os.environ | THREADS | environment}
        socket.send_fds(_server()[0], [json.dumps(job).encode()], [out[1], self._err.fileno(), account[1]])
        for descriptor in (out[1], account[1]):
            os.close(descriptor)
        self.stdout, self._account = os.fdopen(out[0]), os.fdopen(account[0])
        line = self._account.readline()
        if not line:
            _server.cache_clear()
            raise RuntimeError(f"The process that commands are forked from has ended; {module} was not begun.")
        self.pid = int(line)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return True
        return False

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end; what was read of ``stdout`` before is not in the result."""
        timer = threading.Timer(LONGEST, self.send_signal, [signal.SIGKILL])
        timer.start()
        try:
            out = self.stdout.read()
            code = int(self._account.readline())
            self._err.seek(0)
            return subprocess.CompletedProcess([], code, out, self._err.read())
        except BaseException:
            self.send_signal(signal.SIGKILL)
            raise
        finally:
            timer.cancel()
            for file in (self.stdout, self._account, self._err):
                file.close()


class Alone:
    """The same where a process with threads may not be forked: it has imports of its own."""

    def __init__(self, module: str, *words: object, cwd: Path, **environment: str) -> None:
        command = [sys.executable, "-m", module, *map(str, words)]
        environment = os.environ | THREADS | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)
        self.stdout, self.send_signal = self._process.stdout, self._process.send_signal

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end."""
        with self._process:
            out, err = self._process.communicate(timeout=LONGEST)
        return subprocess.CompletedProcess([], self._process.returncode, out, err)


if sys.platform != "linux":
    Running = Alone  # type: ignore[misc, assignment]


def run_module(module: str, *words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE WORD ...`` and wait for it; see :class:`Running`."""
    return Running(module, *words, cwd=cwd, **environment).finish()


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process, which ends with this one, and where it is told what to begin."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        return ours, subprocess.Popen([sys.executable, SERVER], stdin=theirs, env=os.environ | THREADS)
