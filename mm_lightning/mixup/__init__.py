"""Manifold mixup in plain torch: WHERE (layers), WHO (pairing), HOW MUCH (ratio), HOW (interpolation), and targets.

Usable in any training loop: draw a plan for each batch, mix at the planned layer, compute the mixed loss.
"""

from mm_lightning.mixup.cutting import ChannelMix, CutMix, PatchUp, TokenMix
from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.interpolation import linear, mix, mix_part
from mm_lightning.mixup.layers import INPUT, Layer, LayerSpec, MixPoint, has_auto, named_layers, resolve_layers
from mm_lightning.mixup.mixing import interpolate
from mm_lightning.mixup.noise import normal, uniform
from mm_lightning.mixup.noisy import NoisyFeatures
from mm_lightning.mixup.pairing import (
    ConfidentWithUnconfident,
    FromBatch,
    LabelDistance,
    MatchedGroups,
    NearestNeighbors,
    OtherClass,
    RandomPermutation,
    Roll,
    SameClass,
)
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.ratio import BetaRatio, FixedRatio, FoldedRatio, SimilarityRatio, UniformRatio
from mm_lightning.mixup.schedule import (
    Alternating,
    Constant,
    CosineSchedule,
    LinearSchedule,
    Progress,
    Until,
    WarmUp,
)
from mm_lightning.mixup.source import PlanSource
from mm_lightning.mixup.targets import mixed_accuracy, mixed_cross_entropy, mixed_target_entropy

__all__ = [
    "INPUT",
    "Alternating",
    "BetaRatio",
    "ChannelMix",
    "ConfidentWithUnconfident",
    "Constant",
    "CosineSchedule",
    "CutMix",
    "FixedRatio",
    "FoldedRatio",
    "FromBatch",
    "LabelDistance",
    "Layer",
    "LayerSpec",
    "LinearSchedule",
    "MatchedGroups",
    "MixPlan",
    "MixPoint",
    "Mixer",
    "NearestNeighbors",
    "NoisyFeatures",
    "OtherClass",
    "PatchUp",
    "PlanSource",
    "Progress",
    "RandomPermutation",
    "Roll",
    "SameClass",
    "SimilarityRatio",
    "TokenMix",
    "UniformRatio",
    "Until",
    "WarmUp",
    "has_auto",
    "interpolate",
    "linear",
    "mix",
    "mix_part",
    "mixed_accuracy",
    "mixed_cross_entropy",
    "mixed_target_entropy",
    "named_layers",
    "normal",
    "resolve_layers",
    "uniform",
]
