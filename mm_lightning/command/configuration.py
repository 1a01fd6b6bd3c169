"""Where the configuration is that Hydra composes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CONF"]

# In a clone and after an editable install it is beside the package, in a wheel inside it.
_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next((path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir()), _PACKAGE / "conf")
