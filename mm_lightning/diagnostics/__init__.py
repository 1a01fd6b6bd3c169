"""Pictures and numbers of a trained network: compute (pure), draw (a figure), callback (when)."""

try:
    import matplotlib as matplotlib
    import PIL as PIL
except ImportError as error:
    raise ImportError("Diagnostics draw with matplotlib and Pillow: pip install 'mm-lightning[report]'.") from error

from mm_lightning.diagnostics.calibration import Calibration
from mm_lightning.diagnostics.confidence_map import ConfidenceMap
from mm_lightning.diagnostics.hidden_space import HiddenSpace
from mm_lightning.diagnostics.mixup_monitor import MixupMonitor
from mm_lightning.diagnostics.spectrum import Spectrum

__all__ = ["Calibration", "ConfidenceMap", "HiddenSpace", "MixupMonitor", "Spectrum"]
