"""Fit one epoch on two CPU processes with DDP, look at the calibration, and write what each process logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.diagnostics import Calibration


class Classifier(pl.LightningModule):
    """A linear classifier whose validation step returns a loss, which DDP passes through ``forward`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: Path) -> None:
    """Train, and write rank0.json, rank1.json, weights.pt and data.pt."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(48, 4), torch.randint(0, 3, (48,))
    module = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=[Calibration()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    trainer.fit(module, loader, loader)
    numbers = {name: number.item() for name, number in trainer.callback_metrics.items()}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(numbers))
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "weights.pt")
        torch.save((inputs, targets), folder / "data.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
