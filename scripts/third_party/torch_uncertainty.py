"""Routines of torch-uncertainty, around small networks of its own and of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch_uncertainty.losses import DistributionNLLLoss, ELBOLoss, FocalLoss
from torch_uncertainty.models.classification import packed_resnet, resnet
from torch_uncertainty.models.mlp import bayesian_mlp, mlp
from torch_uncertainty.routines import (
    ClassificationRoutine,
    PixelRegressionRoutine,
    RegressionRoutine,
    SegmentationRoutine,
)
from torch_uncertainty.transforms import RepeatTarget

from third_party.case import Case, integers, reals, targets

CLASSES = 3


def cases() -> list[Case]:
    small = {"in_channels": 3, "num_classes": CLASSES, "arch": 18, "style": "cifar"}
    return [
        classes("ClassificationRoutine", "nn.CrossEntropyLoss", lambda: routine(resnet(**small, conv_bias=False))),
        classes(
            "ClassificationRoutine, focal",
            "FocalLoss",
            lambda: routine(resnet(**small, conv_bias=False), FocalLoss(gamma=2.0)),
        ),
        classes(
            "ClassificationRoutine, its own mixup",
            "nn.CrossEntropyLoss of mixed targets",
            lambda: routine(resnet(**small, conv_bias=False), mixup_params={"mixtype": "mixup", "mixup_alpha": 1.0}),
        ),
        classes(
            "ClassificationRoutine, packed ensemble",
            "nn.CrossEntropyLoss, of repeated targets",
            lambda: ensemble(packed_resnet(**small, num_estimators=2, alpha=2, gamma=1, conv_bias=False)),
        ),
        numbers("RegressionRoutine", "nn.MSELoss", lambda: regression(nn.MSELoss())),
        numbers(
            "RegressionRoutine, Gaussian", "DistributionNLLLoss", lambda: regression(DistributionNLLLoss(), "normal")
        ),
        numbers("RegressionRoutine, ELBO", "ELBOLoss, of two passes", elbo),
        Case(
            "SegmentationRoutine",
            "nn.CrossEntropyLoss, of valid pixels",
            lambda: SegmentationRoutine(pixels(CLASSES), CLASSES, nn.CrossEntropyLoss(), optim_recipe=sgd),
            lambda: (reals(3, 8, 8), integers(CLASSES, 8, 8)),
            targets(1),
            inputs=(0,),
        ),
        Case(
            "PixelRegressionRoutine",
            "nn.MSELoss, of valid pixels",
            lambda: PixelRegressionRoutine(pixels(1), 1, nn.MSELoss(), optim_recipe=sgd),
            lambda: (reals(3, 8, 8), reals(8, 8, seed=3)),
            targets(1),
            inputs=(0,),
        ),
    ]


def classes(name: str, loss: str, make: Callable[[], Any]) -> Case:
    return Case(name, loss, make, lambda: (reals(3, 8, 8), integers(CLASSES)), targets(1), inputs=(0,))


def numbers(name: str, loss: str, make: Callable[[], Any]) -> Case:
    return Case(name, loss, make, lambda: (reals(5), reals(2, seed=3)), targets(1), inputs=(0,))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def routine(model: nn.Module, loss: nn.Module | None = None, **more: Any) -> Any:
    return ClassificationRoutine(model, CLASSES, loss or nn.CrossEntropyLoss(), optim_recipe=sgd, **more)


def ensemble(model: nn.Module) -> Any:
    return routine(model, is_ensemble=True, format_batch_fn=RepeatTarget(2))


def regression(loss: nn.Module, family: str | None = None) -> Any:
    model = mlp(5, 2, hidden_dims=[8, 8], dist_family=family)
    return RegressionRoutine(model, 2, loss, dist_family=family, optim_recipe=sgd)


def elbo() -> Any:
    model = bayesian_mlp(5, 2, hidden_dims=[8, 8])
    loss = ELBOLoss(model, nn.MSELoss(), kl_weight=0.01, num_samples=2)
    return RegressionRoutine(model, 2, loss, optim_recipe=sgd)


def pixels(channels: int) -> nn.Module:
    """A network from images to maps."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels, 1)
    )
