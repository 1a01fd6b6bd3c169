"""The log of a run: what it said, on both streams, in a file of its folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from mm_lightning.command import failure

__all__ = ["keep_what_is_said"]

# They write to a stream of their own, and to no other logger.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@contextmanager
def keep_what_is_said(path: Path) -> Iterator[None]:
    """Append lines, warnings and messages to a file, too, and at the end the error, if there is one.

    A bar that is drawn again and again is left out. Hydra's log, of what reaches the root logger, is the same file.

    Raises:
        OSError: If the file cannot be written.
    """
    with path.open("a", encoding="utf-8", buffering=1) as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(message)s"))
        loggers = [logger for logger in map(logging.getLogger, _LOGGERS) if not logger.propagate]
        for logger in loggers:
            logger.addHandler(handler)
        out: Any = _Both(sys.stdout, log)
        err: Any = _Both(sys.stderr, log)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield
        except Exception as error:
            log.write(f"error: {failure.message(error)}\n")
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


class _Both:
    """A stream that keeps in a log what is written to it."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log
        self._is_bar = False

    def write(self, text: str) -> int:
        is_end_of_bar = self._is_bar and text == "\n"
        self._is_bar = "\r" in text or "\x1b" in text or (self._is_bar and not text)
        if not self._is_bar and not is_end_of_bar:
            self._log.write(text)
        return self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
