"""Architectures: plain ``torch.nn`` networks, split into blocks where mixing is natural."""

from mm_lightning.models.classifiers import classifier, timm_classifier, torchvision_classifier
from mm_lightning.models.mlp import mlp_blocks
from mm_lightning.models.preact_resnet import PreActResNet, preact_resnet18, preact_resnet34
from mm_lightning.models.wide_resnet import WideResNet

__all__ = [
    "PreActResNet",
    "WideResNet",
    "classifier",
    "mlp_blocks",
    "preact_resnet18",
    "preact_resnet34",
    "timm_classifier",
    "torchvision_classifier",
]
