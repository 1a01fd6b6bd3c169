"""Pictures and numbers of a trained network: compute (pure), draw (a figure), callback (when)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_lightning.diagnostics.calibration import Calibration
    from mm_lightning.diagnostics.confidence_map import ConfidenceMap
    from mm_lightning.diagnostics.evaluation import Evaluation
    from mm_lightning.diagnostics.hidden_space import HiddenSpace
    from mm_lightning.diagnostics.mixup_monitor import MixupMonitor
    from mm_lightning.diagnostics.spectrum import Spectrum

__all__ = ["Calibration", "ConfidenceMap", "Evaluation", "HiddenSpace", "MixupMonitor", "Spectrum"]

_HOMES = {
    "Calibration": "calibration",
    "ConfidenceMap": "confidence_map",
    "Evaluation": "evaluation",
    "HiddenSpace": "hidden_space",
    "MixupMonitor": "mixup_monitor",
    "Spectrum": "spectrum",
}
_DRAWN_WITH = ("matplotlib", "PIL")


def __getattr__(name: str) -> Any:
    # Names are loaded on first use, so that numbers can be had without what pictures are drawn with.
    if name not in __all__:
        raise AttributeError(f"module 'mm_lightning.diagnostics' has no attribute {name!r}.")
    if name != "Evaluation":
        for package in _DRAWN_WITH:
            try:
                import_module(package)
            except ImportError as error:
                raise ImportError(
                    "Diagnostics draw with matplotlib and Pillow: pip install 'mm-lightning[report]'."
                ) from error
    return getattr(import_module(f"mm_lightning.diagnostics.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
