"""What is raised where a step cannot be looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["LookFailed"]


class LookFailed(RuntimeError):
    """The training step could not be looked at.

    What is raised is of the class of the step's own exception, too, so that handlers for that still see it.
    """

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def because_of(cls, error: Exception, module: nn.Module) -> LookFailed:
        """Say what failed, and what to do."""
        try:
            kind: Any = type(cls.__name__, (cls, type(error)), {})
        except TypeError:  # the layouts of the two do not go together, as with OSError
            kind = cls
        failed: LookFailed = kind.__new__(kind)
        failed.args = (
            f"Manifold mixup could not look at training_step of {type(module).__name__}, which fails with "
            f"{type(error).__name__}: {error} (see above); {_way_out(error)}.",
        )
        return failed


def _way_out(error: Exception) -> str:
    if torch.__version__ < "2.8" and type(error).__module__.startswith("torch._dynamo"):
        return f"with torch.compile it needs torch >= 2.8, and this is {torch.__version__}"
    return "repair it if it does so without ManifoldMixupCallback, too, else train without it"
