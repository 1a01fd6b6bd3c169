"""mnist_bottleneck as it is usually written: a LightningModule, a Dataset, a DataLoader, and Lightning's defaults.

    python scripts/bench/straightforward.py --folder /tmp/straightforward [--workers 2] [--mixup none]

The network, the mixing, the schedule and the validation are those of `python -m mm_lightning.train
+experiment=mnist_bottleneck`; the data come row by row, the loss and the accuracy are logged in every step, and Adam,
checkpoints, progress bar and logger are what one gets without asking. It ends with one picture of the hidden space.
`python scripts/benchmark.py end_to_end` runs both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from mm_lightning.data.mnist import load_mnist

mpl.use("Agg")
import matplotlib.pyplot as plt


class Images(Dataset[tuple[Tensor, int]]):
    """Images and labels, one row at a time, each image made a tensor in [0, 1] as torchvision's ToTensor does."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.numpy(), labels.numpy()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image float32 (1, 28, 28) and its label."""
        return torch.from_numpy(self.images[index]).unsqueeze(0).float().div(255), int(self.labels[index])


class Classifier(L.LightningModule):
    """784-1024-1024-2-1024-1024-10, mixed before the two blocks that follow the bottleneck."""

    def __init__(self, mixup: bool, max_epochs: int) -> None:
        super().__init__()
        self.mixup = mixup
        self.max_epochs = max_epochs
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.LeakyReLU(0.2)),
                nn.Sequential(nn.Linear(1024, 1024), nn.LeakyReLU(0.2)),
                nn.Linear(1024, 2),
                nn.Sequential(nn.Linear(2, 1024), nn.LeakyReLU(0.2)),
                nn.Sequential(nn.Linear(1024, 1024), nn.LeakyReLU(0.2)),
                nn.Linear(1024, 10),
            ]
        )
        self.lam = torch.distributions.Beta(1.0, 1.0)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.hidden: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mix the hidden state before a block, and the targets."""
        hidden, labels = batch
        targets = F.one_hot(labels, 10).float()
        mixed_before = int(torch.randint(3, 5, ())) if self.mixup else None
        for index, block in enumerate(self.blocks):
            if index == mixed_before:
                lam, partner = float(self.lam.sample()), torch.randperm(len(labels))
                hidden = lam * hidden + (1 - lam) * hidden[partner]
                targets = lam * targets + (1 - lam) * targets[partner]
            hidden = block(hidden)
        loss = F.cross_entropy(hidden, targets)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", (hidden.argmax(1) == labels).float().mean())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        images, labels = batch
        logits = self._logits(images)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.accuracy(logits, labels), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy, and what the bottleneck holds."""
        images, labels = batch
        hidden = images
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index == 2:
                self.hidden.append(torch.cat([hidden, labels[:, None]], dim=1))
        self.log("test_acc", self.accuracy(hidden, labels))

    def configure_optimizers(self) -> Any:
        """Adam, and a cosine to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_epochs)]

    def _logits(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def main() -> None:
    """Train, test and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write")
    parser.add_argument("--workers", type=int, default=0, help="num_workers of the DataLoaders (default: 0)")
    parser.add_argument("--mixup", choices=["none", "manifold"], default="manifold")
    parser.add_argument("--max-epochs", type=int, default=14)
    arguments = parser.parse_args()
    L.seed_everything(0)
    data = load_mnist()
    train = Images(data.train_images[:50_000], data.train_labels[:50_000])
    val = Images(data.train_images[50_000:], data.train_labels[50_000:])
    test = Images(data.test_images, data.test_labels)
    workers = {"num_workers": arguments.workers, "persistent_workers": arguments.workers > 0}
    module = Classifier(arguments.mixup == "manifold", arguments.max_epochs)
    trainer = L.Trainer(max_epochs=arguments.max_epochs, accelerator="cpu", default_root_dir=arguments.folder)
    trainer.fit(
        module,
        DataLoader(train, batch_size=100, shuffle=True, **workers),
        DataLoader(val, batch_size=1000, **workers),
    )
    trainer.test(module, DataLoader(test, batch_size=1000, **workers))
    points = torch.cat(module.hidden).cpu()
    figure, axes = plt.subplots()
    axes.scatter(points[:, 0], points[:, 1], c=points[:, 2], cmap="tab10", s=2)
    figure.savefig(arguments.folder / "hidden_space.png")


if __name__ == "__main__":
    main()
