"""The networks whose training steps are timed, each with the places where a hand-written mixup can take it apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from mm_lightning import ManifoldMixupCallback, MixableModule, mixed_accuracy
from mm_lightning.command.configuration import CONF
from mm_lightning.models import preact_resnet18

__all__ = [
    "Classifier",
    "DeepMLP",
    "Network",
    "ResidualNetwork",
    "bottleneck_resnet",
    "deep_mlp",
    "frozen_backbone",
    "mnist_bottleneck",
    "preact_resnet",
    "residual_network",
    "transformer",
]


@dataclass(frozen=True)
class Network:
    """A LightningModule, and what mixup by other means than the callback has to know of it.

    Attributes:
        name: What it is called in a table.
        module: The module as it is trained without mixup.
        parts: Its forward pass is these modules one after the other.
        places: For the name of each eligible layer the index in ``parts`` before which its output is mixed.
        shape: Of a batch of inputs, (N, ...).
        classes: Number of classes, K.
        callback: Makes the callback that mixes at ``places``, from a seed.
        record: What ``training_step`` does with logits (N, K) and targets (N,) beside the loss.
    """

    name: str
    module: pl.LightningModule
    parts: Sequence[nn.Module]
    places: dict[str, int]
    shape: tuple[int, ...]
    classes: int
    callback: Callable[[int], pl.Callback]
    record: Callable[[Tensor, Tensor], None] | None = None


def mnist_bottleneck(batch_size: int = 100) -> Network:
    """The module of the experiment mnist_bottleneck, mixed as there."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=mnist_bottleneck", "run_dir=."])
    module: MixableModule = instantiate(config.model)

    def record(logits: Tensor, targets: Tensor) -> None:
        accuracy = mixed_accuracy(logits, targets)  # what the module does in every step, but for remembering it
        if not module.train_accuracy.update_called:  # once an epoch, at whose end Lightning asks for the mean
            module.train_accuracy.update(accuracy, weight=len(logits))

    return Network(
        name=f"MLP of mnist_bottleneck, batch {batch_size}",
        module=module,
        parts=list(module.blocks),
        places={f"mix_before.{place}": int(place) for place in module.mix_before},
        shape=(batch_size, 1, 28, 28),
        classes=10,
        callback=lambda seed: instantiate(config.mixup, seed=seed),
        record=record,
    )


def residual_network(batch_size: int = 128, size: int = 32) -> Network:
    """A small residual CNN on images (3, ``size``, ``size``), mixed at the input and after its first two stages."""
    module = ResidualNetwork()
    places = {"input": 0, "stage1": 2, "stage2": 3}
    return Network(
        name=f"residual CNN, batch {batch_size}",
        module=module,
        parts=module.parts,
        places=places,
        shape=(batch_size, 3, size, size),
        classes=10,
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed, schedule=None),
    )


def preact_resnet(batch_size: int = 128, width: int = 64) -> Network:
    """The PreActResNet18 of the paper, mixed where the paper mixes it, with its optimizer."""
    network = preact_resnet18(width=width)
    stages = [network.conv1, network.layer1, network.layer2, network.layer3, network.layer4]
    places = {"input": 0, "network.layer1": 2, "network.layer2": 3}
    return Network(
        name=f"PreActResNet18, batch {batch_size}",
        module=PreActClassifier(network),
        parts=[*stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.linear)],
        places=places,
        shape=(batch_size, 3, 32, 32),
        classes=10,
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed, schedule=None),
    )


def deep_mlp(depth: int, width: int, classes: int = 10, batch_size: int = 100, inputs: int = 784) -> Network:
    """A plain MLP, mixed after each of its ``depth`` hidden layers."""
    module = DeepMLP(depth, width, classes, inputs)
    places = {f"hidden.{i}": i + 1 for i in range(depth)}
    return Network(
        name=f"MLP, {depth} x {width}, {classes} classes, batch {batch_size}",
        module=module,
        parts=[*module.hidden, module.head],
        places=places,
        shape=(batch_size, inputs),
        classes=classes,
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed, schedule=None),
    )


def frozen_backbone(depth: int, width: int) -> nn.Module:
    """Linear layers without biases that do not train, and a head for 10 classes that does, for rows (N, D)."""
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(depth)]
    backbone = nn.Sequential(*layers).requires_grad_(False)
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(width, 10)))


def bottleneck_resnet(depths: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """ResNet50 for images (N, 3, 32, 32) of 10 classes: its stem is one 3 x 3 convolution.

    Args:
        depths: Blocks of each stage, three convolutions each.
        width: Channels that the first stage's blocks narrow to; each stage has twice as many as the one before.
    """
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    network: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = width
    for index, depth in enumerate(depths):
        blocks, narrow = [], width * 2**index
        for i in range(depth):
            blocks.append(_Bottleneck(channels, narrow, stride=2 if index and i == 0 else 1))
            channels = 4 * narrow
        network[f"stage{index + 1}"] = nn.Sequential(*blocks)
    network["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(network)


def transformer(depth: int, width: int, heads: int, length: int) -> nn.Module:
    """Transformer encoder for embedded tokens (N, T, D) of 10 classes.

    Args:
        depth: Layers.
        width: Features of a token, D; the feed-forward parts have four times as many.
        heads: Of each layer's attention.
        length: Tokens of a row, T.
    """
    layer = nn.TransformerEncoderLayer(width, heads, dim_feedforward=4 * width, batch_first=True)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    head = nn.Sequential(nn.Flatten(), nn.Linear(length * width, 10))
    return nn.Sequential(OrderedDict(encoder=encoder, head=head))


class _Classifier(pl.LightningModule):
    """Trains with the plain cross-entropy and SGD."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)  # without momentum it keeps nothing


class DeepMLP(_Classifier):
    """Hidden layers ``hidden.0``, ``hidden.1``, ... of one width, and the output layer ``head``.

    Args:
        depth: Hidden layers, each a linear layer and a ReLU.
        width: Units of each.
        classes: Number of logits, K.
        inputs: Features of a row.
    """

    def __init__(self, depth: int, width: int, classes: int = 10, inputs: int = 784) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(sizes[i], width), nn.ReLU()) for i in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, D)."""
        hidden = inputs
        for layer in self.hidden:
            hidden = layer(hidden)
        return self.head(hidden)


class Classifier(_Classifier):
    """Trains a network from PyTorch code, ``network``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K) of a batch."""
        return self.network(inputs)


class PreActClassifier(Classifier):
    """Trains PreActResNet18 as the paper does."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum and weight decay."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class ResidualNetwork(_Classifier):
    """Three stages of one residual block each; a stage's end is a place that everything runs through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stage1, self.stage2, self.stage3 = _ResidualBlock(16, 16), _ResidualBlock(16, 32), _ResidualBlock(32, 64)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    @property
    def parts(self) -> list[nn.Module]:
        """The forward pass, one module after the other."""
        return [self.stem, self.stage1, self.stage2, self.stage3, self.head]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, H, W)."""
        return self.head(self.stage3(self.stage2(self.stage1(self.stem(images)))))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut. A change of channels halves height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.convolutions(hidden) + self.shortcut(hidden))


class _Bottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3 and 1 x 1 beside a shortcut; the last has four times the channels of the others."""

    def __init__(self, inputs: int, narrow: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * narrow
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(inputs, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()),
            *(nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()),
            *(nn.Conv2d(narrow, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*projection)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.convolutions(hidden) + self.shortcut(hidden))
