"""A process that has imported what commands need, and becomes each of them in a fork; see ``tests/own_process.py``."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

import mm_lightning.command.train
import mm_lightning.diagnostics.evaluation  # noqa: F401


def main() -> None:
    """Begin what each message on standard input describes, until there is none."""
    messages = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for a command ends with it
    while (received := socket.recv_fds(messages, 2**20, 3))[0]:
        if not os.fork():
            messages.close()  # or who tells what to begin would not hear of the server's end
            return begin(json.loads(received[0]), *received[1])
        for descriptor in received[1]:
            os.close(descriptor)
    raise SystemExit


def begin(job: dict[str, Any], out: int, err: int, account: int) -> None:
    """Return in the process that becomes the command; in the one that waits for it tell its number, and its code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if process := os.fork():
        for descriptor in (out, err):
            os.close(descriptor)
        os.write(account, f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n".encode())
        os._exit(0)
    assert os.open(os.devnull, os.O_RDONLY) == 0
    for number, descriptor in ((1, out), (2, err)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=False)  # the same objects: loggers have them already
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.path[0] = job["cwd"]
    sys.argv = job["words"]
    os.write(account, f"{os.getpid()}\n".encode())
    os.close(account)


if __name__ == "__main__":
    main()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
