"""Two steps with DDP on two CPU processes; each rank keeps what it saw in the folder given. Run by test_distributed.

With ``ways`` as a second argument, partners are nearest rows, channels are exchanged and the unmixed loss is added.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback
from mm_lightning.mixup import ChannelMix, NearestNeighbors


class Classifier(pl.LightningModule):
    """4-6-3 in float64."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        super().__init__()
        self.callback = callback
        self.first, self.head = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        plan = self.callback.plan
        self.seen.append({"x": batch[0], "y": batch[1], "layer": plan.layer, "lam": plan.lam, "partner": plan.partner})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(torch.tanh(self.first(x))), y)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        plan = self.callback.plan  # settled by now
        self.seen[-1] |= {"used_lam": plan.lam, "partner": plan.partner, "seed": plan.seed}
        self.seen[-1]["weights"] = [parameter.detach().clone() for parameter in self.parameters()]
        self.seen[-1]["grads"] = [parameter.grad.clone() for parameter in self.parameters()]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: Path, ways: bool) -> None:
    """Train, and write rank0.pt and rank1.pt."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 4, dtype=torch.float64), torch.randint(0, 3, (64,)))
    settings: dict[str, Any] = {}
    if ways:
        settings = {"pairing": NearestNeighbors(), "interpolation": ChannelMix(), "clean_weight": 0.5}
    callback = ManifoldMixupCallback(
        **{"alpha": 1.0, "layers": ["input", "first"], "seed": 3, "schedule": None, **settings}
    )
    module = Classifier(callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    torch.save(module.seen, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["ways"])
