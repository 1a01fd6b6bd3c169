"""Numbers of a trained classifier, in plain torch: how good, how sure, how robust, how flat.

Usable with any module and in any loop. :class:`mm_lightning.diagnostics.Evaluation` logs them in Lightning, and the
command ``mm-evaluate`` prints those of a run.
"""

from mm_lightning.evaluation.modes import evaluating
from mm_lightning.evaluation.rows import class_logits
from mm_lightning.evaluation.scores import Reliability, accuracy_intervals, calibration_numbers, reliability, scores
from mm_lightning.evaluation.spectrum import class_spectrum, spectrum_numbers
from mm_lightning.evaluation.temperature import TemperatureFit, TemperatureScaling

__all__ = [
    "Reliability",
    "TemperatureFit",
    "TemperatureScaling",
    "accuracy_intervals",
    "calibration_numbers",
    "class_logits",
    "class_spectrum",
    "evaluating",
    "reliability",
    "scores",
    "spectrum_numbers",
]
