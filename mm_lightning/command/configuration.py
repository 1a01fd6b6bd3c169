"""Where the configuration is that Hydra composes."""

from __future__ import annotations

from pathlib import Path

from mm_lightning import conf

__all__ = ["CONF"]

CONF = Path(conf.__file__).parent
