"""Numbers of a trained classifier, in plain torch: how good, how sure, how robust, how flat.

Usable with any module and in any loop. :class:`mm_lightning.diagnostics.Evaluation` logs them in Lightning, and the
command ``mm-evaluate`` prints those of a run.
"""

from mm_lightning.evaluation.attacks import FGSM, PGD
from mm_lightning.evaluation.bounds import InputBounds, bounds_of_images, bounds_of_rows
from mm_lightning.evaluation.deformations import Rotation, Shear, Zoom, affine, paper_deformations
from mm_lightning.evaluation.modes import evaluating
from mm_lightning.evaluation.neighbours import Neighbours, neighbour_accuracy
from mm_lightning.evaluation.rows import class_logits
from mm_lightning.evaluation.scores import Reliability, accuracy_intervals, calibration_numbers, reliability, scores
from mm_lightning.evaluation.shifts import Blur, Contrast, Noise, shifts_of_five_strengths
from mm_lightning.evaluation.spectrum import class_spectrum, spectrum_numbers
from mm_lightning.evaluation.temperature import TemperatureFit, TemperatureScaling

__all__ = [
    "FGSM",
    "PGD",
    "Blur",
    "Contrast",
    "InputBounds",
    "Neighbours",
    "Noise",
    "Reliability",
    "Rotation",
    "Shear",
    "TemperatureFit",
    "TemperatureScaling",
    "Zoom",
    "accuracy_intervals",
    "affine",
    "bounds_of_images",
    "bounds_of_rows",
    "calibration_numbers",
    "class_logits",
    "class_spectrum",
    "evaluating",
    "neighbour_accuracy",
    "paper_deformations",
    "reliability",
    "scores",
    "shifts_of_five_strengths",
    "spectrum_numbers",
]
