"""Let a package that was written for ``pytorch_lightning`` train under ``lightning``, which is the same code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


def alias_lightning() -> None:
    """Let ``import pytorch_lightning`` and imports from it give the modules of ``lightning.pytorch``."""
    sys.meta_path.insert(0, _Alias())


class _Alias(MetaPathFinder, Loader):
    """Finds ``lightning.pytorch.x`` for ``pytorch_lightning.x``, and so for ``lightning_fabric``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_old = fullname.partition(".")[0] in NAMES
        return ModuleSpec(fullname, self, is_package=True) if is_old else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        old, _, rest = spec.name.partition(".")
        module = importlib.import_module(f"{NAMES[old]}.{rest}".rstrip("."))
        self._own = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__loader__ = self._own  # which importing it under the other name has set
