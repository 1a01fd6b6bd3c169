"""Fit and test on two CPU processes with DDP, evaluate, and write what each process logged."""

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

from mm_lightning.diagnostics import Evaluation
from mm_lightning.evaluation import FGSM


class Classifier(pl.LightningModule):
    """Linear, twice too sure."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data = 2 * torch.eye(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step
    test_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> tuple[Tensor, Tensor]:
    """Inputs (192, 3), and targets that they tell with noise; the first 128 rows are for training and validation."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(192, 3, generator=rng)
    return inputs, (inputs + torch.randn(192, 3, generator=rng)).argmax(dim=1)


def main(folder: Path) -> None:
    """Train and test, and write rank0.json, rank1.json and weights.pt."""
    inputs, targets = data()
    known, tested = (
        DataLoader(TensorDataset(inputs[rows], targets[rows]), batch_size=8) for rows in (slice(128), slice(128, 192))
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=[Evaluation(attacks=[FGSM(0.05)], neighbours=True, spectra=True)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Classifier()
    trainer.fit(module, known, known)
    numbers = {name: number.item() for name, number in trainer.callback_metrics.items()}
    trainer.test(module, tested, verbose=False)
    numbers |= {name: number.item() for name, number in trainer.callback_metrics.items()}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(numbers))
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
