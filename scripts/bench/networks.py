"""The networks whose training steps are timed, each with the places where a hand-written mixup can take it apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from mm_lightning import ManifoldMixupCallback, MixableModule, mixed_accuracy
from mm_lightning.models import preact_resnet18
from mm_lightning.train import CONF

__all__ = ["DeepMLP", "Network", "ResidualNetwork", "deep_mlp", "mnist_bottleneck", "preact_resnet", "residual_network"]


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
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed),
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
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed),
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
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed),
    )


class _Classifier(pl.LightningModule):
    """Trains with the plain cross-entropy."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs), targets)


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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class PreActClassifier(_Classifier):
    """Trains a network from PyTorch code, ``network``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W)."""
        return self.network(images)

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
