"""Manifold Mixup (Verma et al., ICML 2019) for PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_lightning.callback import ManifoldMixupCallback
    from mm_lightning.command.loading import load
    from mm_lightning.look.inspection import inspect
    from mm_lightning.mixup import (
        Alternating,
        BetaRatio,
        ChannelMix,
        ConfidentWithUnconfident,
        CosineSchedule,
        CutMix,
        FixedRatio,
        FoldedRatio,
        FromBatch,
        LabelDistance,
        LinearSchedule,
        MatchedGroups,
        MixPlan,
        MixPoint,
        NearestNeighbors,
        NoisyFeatures,
        OtherClass,
        PatchUp,
        PlanSource,
        RandomPermutation,
        Roll,
        SameClass,
        SimilarityRatio,
        TokenMix,
        UniformRatio,
        Until,
        WarmUp,
        interpolate,
        mix,
        mixed_accuracy,
        mixed_cross_entropy,
        mixed_target_entropy,
    )
    from mm_lightning.module import MixableModule

__all__ = [
    "Alternating",
    "BetaRatio",
    "ChannelMix",
    "ConfidentWithUnconfident",
    "CosineSchedule",
    "CutMix",
    "FixedRatio",
    "FoldedRatio",
    "FromBatch",
    "LabelDistance",
    "LinearSchedule",
    "ManifoldMixupCallback",
    "MatchedGroups",
    "MixPlan",
    "MixPoint",
    "MixableModule",
    "NearestNeighbors",
    "NoisyFeatures",
    "OtherClass",
    "PatchUp",
    "PlanSource",
    "RandomPermutation",
    "Roll",
    "SameClass",
    "SimilarityRatio",
    "TokenMix",
    "UniformRatio",
    "Until",
    "WarmUp",
    "inspect",
    "interpolate",
    "load",
    "mix",
    "mixed_accuracy",
    "mixed_cross_entropy",
    "mixed_target_entropy",
]

__version__ = "0.1.0"

_HOMES = {
    "ManifoldMixupCallback": "mm_lightning.callback",
    "MixableModule": "mm_lightning.module",
    "load": "mm_lightning.command.loading",
}


def __getattr__(name: str) -> Any:
    # Names are loaded on first use, so that mm_lightning.mixup can be had without importing lightning.
    if name not in __all__:
        raise AttributeError(f"module 'mm_lightning' has no attribute {name!r}.")
    if name == "inspect":  # the module is the command, and may be called as the function
        return import_module("mm_lightning.inspect")
    return getattr(import_module(_HOMES.get(name, "mm_lightning.mixup")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
