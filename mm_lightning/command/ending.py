"""What a run says when it is over: what was measured in the test, and where everything is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ending", "line_of"]

_PREFIXES = ("test/", "test_")
_EVALUATION = "evaluation/"
_SHOWN = ("evaluation/temperature", "evaluation/nll_scaled")


def ending(folder: Path, tested: Mapping[str, float], seconds: float) -> str:
    """Return the last lines of a run.

    Args:
        folder: Of the run.
        tested: What was logged in the test, by key.
        seconds: That the run took.
    """
    pictures = sorted(path for path in folder.glob("figures/*") if path.suffix in (".png", ".gif"))
    lines = [
        f"Test         {line_of(tested) or 'nothing was logged'}",
        f"Run folder   {folder}  ({seconds:.0f} s)",
        *(f"Figure       {path}" for path in pictures),
        *(f"TensorBoard  tensorboard --logdir {shlex.quote(str(folder))}" for _ in folder.glob("tensorboard")),
    ]
    return "\n".join(lines)


def line_of(tested: Mapping[str, float]) -> str:
    """Return what was logged in the test in a line: ``acc 0.9650  loss, nll 0.1610``, each number once.

    What a diagnostic has measured again under a longer name (``calibration/nll`` beside ``nll``) is left out, and of
    what an evaluation measures all but the temperature and the likelihood with it.
    """
    short = {_short(key): value for key, value in sorted(tested.items())}
    own = {name: value for name, value in short.items() if "/" not in name or name.rsplit("/", 1)[1] not in short}
    own = {name: value for name, value in own.items() if not name.startswith(_EVALUATION) or name in _SHOWN} or own
    names: dict[str, list[str]] = {}
    for name, value in own.items():
        names.setdefault(f"{value:.4f}", []).append(name)
    return "  ".join(f"{', '.join(same)} {text}" for text, same in names.items())


def _short(key: str) -> str:
    return next((key[len(prefix) :] for prefix in _PREFIXES if key.startswith(prefix)), key)
