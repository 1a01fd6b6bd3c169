"""Pre-activation residual networks for small images, as in the paper's CIFAR and SVHN experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mm_lightning.arguments import check_count, plain
from mm_lightning.models.preact_block import conv3x3, stage

__all__ = ["PreActResNet", "preact_resnet18", "preact_resnet34"]


def preact_resnet18(
    num_classes: int | None = 10, width: int = 64, in_channels: int | None = 3, stride: int = 1
) -> PreActResNet:
    """Build PreActResNet18, with 2 blocks in each stage. Arguments as of :class:`PreActResNet`."""
    return PreActResNet((2, 2, 2, 2), num_classes, width, in_channels, stride)


def preact_resnet34(
    num_classes: int | None = 10, width: int = 64, in_channels: int | None = 3, stride: int = 1
) -> PreActResNet:
    """Build PreActResNet34, with 3, 4, 6 and 3 blocks in its stages. Arguments as of :class:`PreActResNet`."""
    return PreActResNet((3, 4, 6, 3), num_classes, width, in_channels, stride)


class PreActResNet(nn.Module):
    """Residual network of pre-activation blocks (He et al. 2016, "Identity mappings in deep residual networks").

    As in the code of Verma et al. (2019): a 3x3 convolution, four stages, the mean over H and W, a linear layer; no
    pooling at the start, and no normalisation after the last block. The paper mixes the input and the ends of
    ``layer1`` and ``layer2`` (table 5).

    ========= ============================ ================================
    attribute output, for (N, 3, 32, 32)   in general, with s the ``stride``
    ========= ============================ ================================
    conv1     (N, width, 32, 32)           (N, width, H/s, W/s)
    layer1    (N, width, 32, 32)           (N, width, H/s, W/s)
    layer2    (N, 2 width, 16, 16)         (N, 2 width, H/2s, W/2s)
    layer3    (N, 4 width, 8, 8)           (N, 4 width, H/4s, W/4s)
    layer4    (N, 8 width, 4, 4)           (N, 8 width, H/8s, W/8s)
    linear    (N, num_classes), the logits (N, num_classes)
    ========= ============================ ================================

    Args:
        blocks: Number of blocks in each of the four stages, each >= 1.
        num_classes: Number of classes, K. None, where the command leaves it to data that do not tell, is refused.
        width: Channels of the first stage; each later stage has twice those of the one before. 64 in the papers.
        in_channels: Channels of the images, 3 for RGB. None is refused as well.
        stride: Of the first convolution: 1 for 32x32 images, 2 for the paper's 64x64 of Tiny-ImageNet.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If ``blocks`` are not four numbers, or a number is below 1.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int | None = 10,
        width: int = 64,
        in_channels: int | None = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        stages: Any = plain(blocks)
        if not isinstance(stages, list) or len(stages) != 4:
            raise ValueError(f"blocks must hold four numbers of blocks, got {stages!r}. (2, 2, 2, 2) is of 18 layers.")
        for i, count in enumerate(stages):
            check_count(f"blocks[{i}]", count, 1, "(2, 2, 2, 2) is of 18 layers.")
        check_count("width", width, 1, "64 is the papers'.")
        check_count("stride", stride, 1, "1 is for 32x32 images, 2 for 64x64.")
        check_count("num_classes", num_classes, 1, "It is read from data that have num_classes.")
        check_count("in_channels", in_channels, 1, "It is read from data that are images; model=mlp takes all others.")
        assert num_classes is not None  # of type checkers: that is no integer
        assert in_channels is not None
        self.conv1 = conv3x3(in_channels, width, stride)
        self.layer1 = stage(stages[0], width, width, stride=1)
        self.layer2 = stage(stages[1], width, 2 * width, stride=2)
        self.layer3 = stage(stages[2], 2 * width, 4 * width, stride=2)
        self.layer4 = stage(stages[3], 4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (N, K), of images (N, C, H, W)."""
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(hidden.mean(dim=(2, 3)))
