"""Copies from one device to another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``, without waiting for what a GPU is doing.

    Pinned memory lets the copy to a GPU overlap with its work.
    """
    to_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if to_gpu else tensor.to(device)
