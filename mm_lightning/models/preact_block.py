"""The pre-activation block of residual networks, and stages of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PreActBlock", "conv3x3", "stage"]


class PreActBlock(nn.Module):
    """``shortcut + conv2(relu(bn2(conv1(a))))`` with ``a = relu(bn1(x))``.

    The shortcut is ``x`` itself or, where the shape changes, a 1x1 convolution of ``a``.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the hidden states that follow ``x``, (N, C, H, W)."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


def stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    """Build as many blocks, one after the other, of which the first changes the channels and takes the stride."""
    first = PreActBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(PreActBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


def conv3x3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution without a bias, with zeros around the image."""
    return nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False)
