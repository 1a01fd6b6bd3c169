"""Manifold mixup in plain torch: WHERE (layers), WHO (pairing), HOW MUCH (ratio), HOW (interpolation), and targets.

Usable in any training loop: draw a plan for each batch, mix at the planned layer, compute the mixed loss.
"""

from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.interpolation import linear, mix
from mm_lightning.mixup.layers import INPUT, Layer, LayerSpec, MixPoint, has_auto, named_layers, resolve_layers
from mm_lightning.mixup.pairing import RandomPermutation, Roll
from mm_lightning.mixup.plan import MixPlan, PlanSource
from mm_lightning.mixup.ratio import BetaRatio
from mm_lightning.mixup.targets import mixed_accuracy, mixed_cross_entropy, mixed_target_entropy

__all__ = [
    "INPUT",
    "BetaRatio",
    "Layer",
    "LayerSpec",
    "MixPlan",
    "MixPoint",
    "Mixer",
    "PlanSource",
    "RandomPermutation",
    "Roll",
    "has_auto",
    "linear",
    "mix",
    "mixed_accuracy",
    "mixed_cross_entropy",
    "mixed_target_entropy",
    "named_layers",
    "resolve_layers",
]
