"""Data and a model of one's own: points in rings, and a LightningModule that knows nothing of mm_lightning."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Rings(pl.LightningDataModule):
    """Noisy points in ``num_classes`` rings around the origin; the ring is the class."""

    def __init__(self, num_classes: int = 3, num_points: int = 1200, batch_size: int = 50, seed: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes  # this and input_shape are what the command hands to a model that takes them
        self.input_shape = (2,)
        self.num_points, self.batch_size, self.seed = num_points, batch_size, seed

    def setup(self, stage: str) -> None:
        """Draw the points."""
        rng = torch.Generator().manual_seed(self.seed)
        targets = torch.arange(self.num_points) % self.num_classes
        angle = 2 * torch.pi * torch.rand(self.num_points, generator=rng)
        noise = torch.randn(self.num_points, generator=rng)
        radius = 1 + targets + 0.1 * noise
        self.rows = TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), targets)

    def _loader(self, begin: float, end: float, shuffle: bool = False) -> DataLoader:
        rows = range(int(begin * self.num_points), int(end * self.num_points))
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(torch.utils.data.Subset(self.rows, rows), self.batch_size, shuffle, generator=generator)

    def train_dataloader(self) -> DataLoader:
        """The first 80 %."""
        return self._loader(0, 0.8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The next 10 %."""
        return self._loader(0.8, 0.9)

    def test_dataloader(self) -> DataLoader:
        """The last 10 %."""
        return self._loader(0.9, 1)


class RingClassifier(pl.LightningModule):
    """A classifier that logs ``val_acc``. It has no ``configure_optimizers``: the command's is set up for it."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, width), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """The logits (N, K) of points (N, 2)."""
        return self.head(self.hidden(self.encoder(points)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch; ManifoldMixupCallback mixes it without a change here."""
        points, targets = batch
        loss = F.cross_entropy(self(points), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        points, targets = batch
        logits = self(points)
        self.log(f"{name}_loss", F.cross_entropy(logits, targets))
        self.log(f"{name}_acc", (logits.argmax(dim=1) == targets).float().mean())
