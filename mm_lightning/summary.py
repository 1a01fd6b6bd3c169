"""What is left of a fit: the layers, and how many batches were mixed at each, also of a fit in other processes."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

__all__ = ["Summary"]


class Summary:
    """Counts batches. A process that was spawned for the fit leaves them to the one that it was spawned from."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._file = Path(tempfile.gettempdir(), f"mm_lightning-{uuid.uuid4().hex}.json")
        self._layers: tuple[str, ...] = ()
        self._counts: Counter[str] = Counter()
        self._is_own = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the eligible layers."""
        self._take_over()
        return self._layers

    @layers.setter
    def layers(self, layers: tuple[str, ...]) -> None:
        self._layers = layers

    @property
    def counts(self) -> Counter[str]:
        """Number of batches by layer."""
        self._take_over()
        return self._counts

    def begin(self) -> None:
        """A fit begins in this process."""
        self._counts.clear()
        self._is_own = True

    def count(self, layer: str) -> None:
        """One batch was mixed at this layer."""
        self._counts[layer] += 1

    def end(self) -> None:
        """The fit is over."""
        if os.getpid() != self._process and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self._file.write_text(json.dumps([self._layers, self._counts]), encoding="utf-8")

    def _take_over(self) -> None:
        if not self._is_own and os.getpid() == self._process:
            with suppress(FileNotFoundError):
                layers, counts = json.loads(self._file.read_text(encoding="utf-8"))
                self._file.unlink()
                self._layers, self._counts = tuple(layers), Counter(counts)
