"""Architectures: plain ``torch.nn`` networks, split into blocks where mixing is natural."""

from mm_lightning.models.mlp import mlp_blocks
from mm_lightning.models.preact_resnet import PreActResNet, preact_resnet18, preact_resnet34

__all__ = ["PreActResNet", "mlp_blocks", "preact_resnet18", "preact_resnet34"]
