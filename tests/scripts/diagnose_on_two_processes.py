"""Train, validate and diagnose with DDP on two CPU processes; each keeps what it saw in the folder given.

Run by diagnostics/test_two_processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback
from mm_lightning.diagnostics import MixupMonitor
from mm_lightning.diagnostics.diagnostic import Diagnostic, Findings, Rows


class Spy(Diagnostic):
    """Keeps the rows of each look."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("spy", ["output", "first", "input"], **settings)
        self.seen: list[dict[str, Any]] = []

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: Rows) -> Findings:
        self.seen.append({**rows.hidden, "targets": rows.targets, "split": rows.split})
        return Findings(
            {"power": rows.hidden["first"].square().mean().item()}, {"rank": torch.tensor(trainer.global_rank)}
        )

    def draw(self, findings: Findings, rows: Rows) -> Figure:
        return Figure(figsize=(1, 1), dpi=50)


class Classifier(pl.LightningModule):
    """4-6-3, whose steps return the losses of single rows in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Kept(pl.Callback):
    """Keeps each batch's plan and loss."""

    def __init__(self, mixup: ManifoldMixupCallback) -> None:
        self.mixup = mixup
        self.batches: list[tuple[str | None, float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.batches.append((self.mixup.plan.layer, float(self.mixup.plan.lam[0]), float(outputs["loss"])))


def main(folder: Path) -> None:
    """Train, and write rank0.pt and rank1.pt."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
    mixup = ManifoldMixupCallback(alpha=1.0, layers=["input", "first"], seed=3, schedule=None)
    spy, kept, module = Spy(train_points=12), Kept(mixup), Classifier()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=[MixupMonitor(), mixup, spy, kept],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=8))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    saved = {"seen": spy.seen, "metrics": metrics, "batches": kept.batches, "data": data.tensors, "state": state}
    torch.save(saved, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
