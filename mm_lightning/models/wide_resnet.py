"""Wide residual networks for small images, as in the paper's CIFAR and SVHN experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning.arguments import check_count, check_integer
from mm_lightning.models.preact_block import conv3x3, stage

__all__ = ["WideResNet"]

_BASE = 16  # channels of the first convolution, and of the first stage at widen 1


class WideResNet(nn.Module):
    """Wide residual network of pre-activation blocks without dropout (Zagoruyko & Komodakis, 2016).

    A 3x3 convolution, three stages, a normalisation with ReLU, the mean over H and W, a linear layer. Verma et al.
    (2019) mix the input and the end of ``layer1``; their code, which mixes the end of ``layer2`` too, differs from the
    network of the source, and so from this one: its convolutions have biases, its blocks take their stride in the
    second convolution and their shortcut from ``x`` itself, and the last normalisation has the momentum 0.9.

    ========= ============================ ================================
    attribute output, for (N, 3, 32, 32)   in general, with s the ``stride``
    ========= ============================ ================================
    conv1     (N, 16, 32, 32)              (N, 16, H/s, W/s)
    layer1    (N, 16 widen, 32, 32)        (N, 16 widen, H/s, W/s)
    layer2    (N, 32 widen, 16, 16)        (N, 32 widen, H/2s, W/2s)
    layer3    (N, 64 widen, 8, 8)          (N, 64 widen, H/4s, W/4s)
    linear    (N, num_classes), the logits (N, num_classes)
    ========= ============================ ================================

    Args:
        depth: Convolutions, those of shortcuts among them: 6 n + 4 for n blocks in each stage; 28 in the papers.
        widen: Factor on the channels of all stages; 10 in the papers.
        num_classes: Number of classes, K. None, where the command leaves it to data that do not tell, is refused.
        in_channels: Channels of the images, 3 for RGB. None is refused as well.
        stride: Of the first convolution: 1 for 32x32 images, 2 for 64x64.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If ``depth`` is not 10, 16, 22, 28, ..., or another number is below 1.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        num_classes: int | None = 10,
        in_channels: int | None = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        expected = "6 n + 4 for a whole n >= 1"
        check_integer("depth", depth, expected, lambda depth: depth >= 10 and depth % 6 == 4, "28 is the papers'.")
        check_count("widen", widen, 1, "10 is the papers'.")
        check_count("stride", stride, 1, "1 is for 32x32 images, 2 for 64x64.")
        check_count("num_classes", num_classes, 1, "It is read from data that have num_classes.")
        check_count("in_channels", in_channels, 1, "It is read from data that are images; model=mlp takes all others.")
        assert num_classes is not None  # of type checkers: that is no integer
        assert in_channels is not None
        blocks, channels = (depth - 4) // 6, _BASE * widen
        self.conv1 = conv3x3(in_channels, _BASE, stride)
        self.layer1 = stage(blocks, _BASE, channels, stride=1)
        self.layer2 = stage(blocks, channels, 2 * channels, stride=2)
        self.layer3 = stage(blocks, 2 * channels, 4 * channels, stride=2)
        self.bn = nn.BatchNorm2d(4 * channels)
        self.linear = nn.Linear(4 * channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (N, K), of images (N, C, H, W)."""
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.linear(F.relu(self.bn(hidden)).mean(dim=(2, 3)))
