"""Trainers of torchgeo, around small networks without pretrained weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torchgeo import trainers

from third_party.case import Case, integers, reals, targets, with_sgd

RESNET = {"model": "resnet18", "in_channels": 3, "weights": None}
UNET = {"model": "unet", "backbone": "resnet18", "in_channels": 3, "weights": None}


def cases() -> list[Case]:
    return [
        images("ClassificationTask", "nn.CrossEntropyLoss", label, lambda: task("Classification", num_classes=3)),
        images(
            "ClassificationTask, focal", "focal loss", label, lambda: task("Classification", "focal", num_classes=3)
        ),
        images("ClassificationTask, multilabel", "nn.BCEWithLogitsLoss", labels, multilabel),
        images("RegressionTask", "nn.MSELoss", number, lambda: task("Regression", "mse", num_outputs=1)),
        images("RegressionTask, MAE", "nn.L1Loss", number, lambda: task("Regression", "mae", num_outputs=1)),
        images("SemanticSegmentationTask", "nn.CrossEntropyLoss", mask, lambda: unet("SemanticSegmentation")),
        images(
            "SemanticSegmentationTask, Jaccard", "Jaccard loss", mask, lambda: unet("SemanticSegmentation", "jaccard")
        ),
        images("PixelwiseRegressionTask", "nn.MSELoss", depth, lambda: unet("PixelwiseRegression", "mse")),
        images("BYOLTask", "two views, an averaged teacher", nothing, lambda: trainers.BYOLTask(**RESNET)),
        images(
            "SimCLRTask", "NT-Xent of two views", nothing, lambda: trainers.SimCLRTask(**RESNET, memory_bank_size=0)
        ),
    ]


def images(name: str, loss: str, target: Callable[[], dict[str, Any]], make: Callable[[], Any]) -> Case:
    def batch() -> dict[str, Any]:
        return {"image": reals(3, 32, 32), **target()}

    return Case(
        name,
        loss,
        lambda: with_sgd(make()),
        batch,
        targets(*target()),
        inputs=("image",),
        has_targets=bool(target()),
    )


def task(name: str, loss: str = "ce", **settings: Any) -> Any:
    return getattr(trainers, f"{name}Task")(**RESNET, loss=loss, **settings)


def multilabel() -> Any:
    return task("Classification", "bce", task="multilabel", num_labels=3)


def unet(name: str, loss: str = "ce") -> nn.Module:
    outputs = {"num_outputs": 1} if name == "PixelwiseRegression" else {"task": "multiclass", "num_classes": 3}
    return getattr(trainers, f"{name}Task")(**UNET, loss=loss, **outputs)


def label() -> dict[str, Any]:
    return {"label": integers(3)}


def labels() -> dict[str, Any]:
    return {"label": integers(2, 3)}


def number() -> dict[str, Any]:
    return {"label": reals(seed=3)}


def mask() -> dict[str, Any]:
    return {"mask": integers(3, 32, 32)}


def depth() -> dict[str, Any]:
    return {"mask": reals(32, 32, seed=3)}


def nothing() -> dict[str, Any]:
    return {}
