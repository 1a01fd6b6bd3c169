"""Manifold mixup in plain torch: WHERE (layers), WHO (pairing), HOW MUCH (ratio), HOW (interpolation), and targets.

Usable in any training loop: draw a plan for each batch, mix at the planned layer, compute the mixed loss.
"""

from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.interpolation import linear, mix
from mm_lightning.mixup.layers import INPUT, Layer, LayerSpec, MixPoint, has_auto, named_layers, resolve_layers
from mm_lightning.mixup.pairing import RandomPermutation, Roll
from mm_lightning.mixup.plan import MixPlan, PlanSource
from mm_lightning.mixup.ratio import BetaRatio
from mm_lightning.mixup.target_pair import TargetPair, mix_loss, mixed_accuracy, mixed_target_entropy
from mm_lightning.mixup.targets import mixed_cross_entropy

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
    "TargetPair",
    "has_auto",
    "linear",
    "mix",
    "mix_loss",
    "mixed_accuracy",
    "mixed_cross_entropy",
    "mixed_target_entropy",
    "named_layers",
    "resolve_layers",
]
