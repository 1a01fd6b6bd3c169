"""Which layers of a module can be mixed.

In Python ``mm_lightning.inspect(module, batch)``; for a configured experiment
``python -m mm_lightning.inspect +experiment=mnist_bottleneck``, which takes what ``mm_lightning.train`` takes.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from mm_lightning.look.inspection import Inspection, LayerReport, inspect

__all__ = ["Inspection", "LayerReport", "inspect"]


class _CallableModule(types.ModuleType):
    """``mm_lightning.inspect`` names this module, for ``python -m``, and the function in it."""

    def __call__(self, module: Any, batch: Any, **settings: Any) -> Inspection:
        return inspect(module, batch, **settings)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from mm_lightning.command.scripts import inspect as main  # the command alone needs hydra

    main()
