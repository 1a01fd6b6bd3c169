"""A process that has imported what a run needs, and makes runs in forks of itself.

A small run takes a second, and its imports several. Each line on standard input describes a run: ``{"arguments": [...],
"log": FILE, "environment": {...}}``. It is answered by its process number when it has begun, and by its exit code when
it has ended; the first answer, to nothing, says that all is imported. Nothing is computed before a fork, so that no
device is there to be forked, and no thread at work. The process ends when standard input does: Ctrl-C and SIGTERM are
for who asks for the runs, and has to hear of their ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["main"]

_COMMAND = "mm_lightning.train"


def main() -> None:
    """Make runs until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    import mm_lightning.command.train
    import mm_lightning.diagnostics.evaluation  # noqa: F401  # of each run of a study

    print(os.getpid(), flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        process = os.fork()
        if not process:
            _make(run)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _make(run: dict[str, Any]) -> None:
    """Be a process of ``python -m mm_lightning.train``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, file in ((0, nothing), (1, log), (2, log)):
            os.dup2(file, number)
        os.environ.update(run["environment"])
        _seem_typed(run["arguments"])
        from mm_lightning.command import scripts

        scripts.train()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()  # as the interpreter would
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _seem_typed(arguments: Sequence[str]) -> None:
    """Let the process seem begun as the command: Lightning begins those of other devices like it (DDP)."""
    sys.argv = [_COMMAND, *arguments]
    sys.modules["__main__"].__spec__ = find_spec(_COMMAND)


if __name__ == "__main__":
    main()
