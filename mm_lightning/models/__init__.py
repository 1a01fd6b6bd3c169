"""Architectures: plain ``torch.nn`` networks, split into blocks where mixing is natural."""

from mm_lightning.models.mlp import mlp_blocks

__all__ = ["mlp_blocks"]
