"""Pictures and numbers of a trained network: compute (pure), draw (a figure), callback (when)."""

from mm_lightning.diagnostics.calibration import Calibration
from mm_lightning.diagnostics.confidence_map import ConfidenceMap
from mm_lightning.diagnostics.hidden_space import HiddenSpace
from mm_lightning.diagnostics.mixup_monitor import MixupMonitor
from mm_lightning.diagnostics.spectrum import Spectrum

__all__ = ["Calibration", "ConfidenceMap", "HiddenSpace", "MixupMonitor", "Spectrum"]
