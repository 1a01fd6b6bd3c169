"""Four steps on two CPU processes with sharded weights; each rank keeps what it saw in the folder given.

Run by test_fsdp: once with FSDP2, where each rank has a batch of its own, and once with tensor parallelism, where both
compute one batch together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback


class Classifier(pl.LightningModule):
    """4-8-8-3 with tanh in float64."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        super().__init__()
        self.callback = callback
        self.first, self.second, self.head = (nn.Linear(*sizes).double() for sizes in ((4, 8), (8, 8), (8, 3)))
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        plan = self.callback.plan
        self.seen.append({"x": batch[0], "y": batch[1], "layer": plan.layer, "lam": plan.lam, "partner": plan.partner})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.seen[-1]["loss"] = loss.detach().clone()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen[-1]["weights"] = {name: _full(parameter) for name, parameter in self.named_parameters()}
        self.seen[-1]["grads"] = {name: _full(parameter.grad) for name, parameter in self.named_parameters()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FullySharded(Classifier):
    """Every layer's weights are sharded over both ranks, and gathered when it runs."""

    def configure_model(self) -> None:
        for part in (self.first, self.second, self.head, self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class TensorParallel(Classifier):
    """Each rank computes half of the units of the first layer, and the second layer's sum over them."""

    def configure_model(self) -> None:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(self, self.device_mesh["tensor_parallel"], plan)


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(kind: type[Classifier], data_parallel_size: int) -> list[dict[str, Any]]:
    """Train, and return what this rank saw."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 4, dtype=torch.float64), torch.randint(0, 3, (64,)))
    callback = ManifoldMixupCallback(alpha=1.0, layers=["input", "first", "second"], seed=0, schedule=None)
    module = kind(callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size, tensor_parallel_size=2 // data_parallel_size),
        max_epochs=1,
        limit_train_batches=4,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    return module.seen


def main(folder: Path) -> None:
    """Write rank0.pt and rank1.pt."""
    seen = {"fsdp": train(FullySharded, 2), "tensor parallel": train(TensorParallel, 1)}
    torch.save(seen, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
