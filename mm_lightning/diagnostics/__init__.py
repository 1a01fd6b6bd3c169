"""Pictures and numbers of a trained network: compute (pure), draw (a figure), callback (when)."""

from mm_lightning.diagnostics.hidden_space import HiddenSpace

__all__ = ["HiddenSpace"]
