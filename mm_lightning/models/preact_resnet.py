"""Pre-activation residual networks for small images, as in the paper's CIFAR and SVHN experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning.arguments import check_count, plain

__all__ = ["PreActResNet", "preact_resnet18", "preact_resnet34"]


def preact_resnet18(num_classes: int | None = 10, width: int = 64, in_channels: int | None = 3) -> PreActResNet:
    """Build PreActResNet18, with 2 blocks in each stage. Arguments as of :class:`PreActResNet`."""
    return PreActResNet((2, 2, 2, 2), num_classes, width, in_channels)


def preact_resnet34(num_classes: int | None = 10, width: int = 64, in_channels: int | None = 3) -> PreActResNet:
    """Build PreActResNet34, with 3, 4, 6 and 3 blocks in its stages. Arguments as of :class:`PreActResNet`."""
    return PreActResNet((3, 4, 6, 3), num_classes, width, in_channels)


class PreActResNet(nn.Module):
    """Residual network of pre-activation blocks (He et al. 2016, "Identity mappings in deep residual networks").

    As in the code of Verma et al. (2019): a 3x3 convolution, four stages, the mean over H and W, a linear layer; no
    pooling at the start, and no normalisation after the last block. The paper mixes the input and the ends of
    ``layer1`` and ``layer2`` (table 5).

    ========= ============================ =========================
    attribute output, for (N, 3, 32, 32)   in general
    ========= ============================ =========================
    conv1     (N, width, 32, 32)           (N, width, H, W)
    layer1    (N, width, 32, 32)           (N, width, H, W)
    layer2    (N, 2 width, 16, 16)         (N, 2 width, H/2, W/2)
    layer3    (N, 4 width, 8, 8)           (N, 4 width, H/4, W/4)
    layer4    (N, 8 width, 4, 4)           (N, 8 width, H/8, W/8)
    linear    (N, num_classes), the logits (N, num_classes)
    ========= ============================ =========================

    Args:
        blocks: Number of blocks in each of the four stages, each >= 1.
        num_classes: Number of classes, K. None, where the command leaves it to data that do not tell, is refused.
        width: Channels of the first stage; each later stage has twice those of the one before. 64 in the papers.
        in_channels: Channels of the images, 3 for RGB. None is refused as well.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If ``blocks`` are not four numbers, or a number is below 1.
    """

    def __init__(
        self, blocks: Sequence[int], num_classes: int | None = 10, width: int = 64, in_channels: int | None = 3
    ) -> None:
        super().__init__()
        stages: Any = plain(blocks)
        if not isinstance(stages, list) or len(stages) != 4:
            raise ValueError(f"blocks must hold four numbers of blocks, got {stages!r}. (2, 2, 2, 2) is of 18 layers.")
        for i, count in enumerate(stages):
            check_count(f"blocks[{i}]", count, 1, "(2, 2, 2, 2) is of 18 layers.")
        check_count("width", width, 1, "64 is the papers'.")
        check_count("num_classes", num_classes, 1, "It is read from data that have num_classes.")
        check_count("in_channels", in_channels, 1, "It is read from data that are images; model=mlp takes all others.")
        assert num_classes is not None  # of type checkers: that is no integer
        assert in_channels is not None
        self.conv1 = _conv3x3(in_channels, width)
        self.layer1 = _stage(stages[0], width, width, stride=1)
        self.layer2 = _stage(stages[1], width, 2 * width, stride=2)
        self.layer3 = _stage(stages[2], 2 * width, 4 * width, stride=2)
        self.layer4 = _stage(stages[3], 4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (N, K), of images (N, C, H, W)."""
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(hidden.mean(dim=(2, 3)))


class _PreActBlock(nn.Module):
    """``shortcut + conv2(relu(bn2(conv1(a))))`` with ``a = relu(bn1(x))``.

    The shortcut is ``x`` itself or, where the shape changes, a 1x1 convolution of ``a``.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


def _stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = _PreActBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(_PreActBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


def _conv3x3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False)
