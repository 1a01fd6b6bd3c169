"""What each of the Trainer's conveniences adds to an epoch, one switched on at a time."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from torch import Tensor

from bench.command import SMALL, bare_network, compose_epoch, cut, train_bare, training_seconds
from bench.timing import Run, compare
from mm_lightning.command.progress import EpochLines, TerminalBar
from mm_lightning.command.train import build_trainer
from mm_lightning.fast_cpu import fast_products, keep_freed_memory

__all__ = ["measure"]

NOTES = [
    "lean: a Trainer without logger, bar and checkpoint, whose training_step logs nothing. Each further side switches"
    " on what its name says; nothing is mixed.",
    "With fast_cpu on all sides: the shorter the steps, the more the rest weighs.",
    "Bars and lines are drawn into memory; a terminal costs something on top.",
    "microseconds_a_batch: what a side takes beyond lean, by its median ratio.",
]


def measure(quick: bool) -> dict[str, Any]:
    """Time one short epoch of the network of mnist_bottleneck under Trainers that differ in one thing each."""
    batches, rounds = (60, 2) if quick else (250, 7)
    with tempfile.TemporaryDirectory() as folder:
        # The diagnostics do nothing in a training step.
        config = compose_epoch(folder, batches, "mixup=none", "diagnostics=none", *[SMALL, "data.limit=6000"] * quick)
        sides = _sides(config, folder, batches)
        keep_freed_memory()
        with fast_products():
            name = f"mnist_bottleneck, {batches} batches"
            row = compare(name, sides, "lean", rounds, warmup=not quick, batches=batches)
    lean = row["median_seconds"]["lean"]
    parts = [
        {"side": side, "microseconds_a_batch": round(1e6 * lean * (found["median"] - 1) / batches, 1)}
        for side, found in row["ratios"].items()
    ]
    return {"rows": [row], "parts": parts, "notes": NOTES}


def _sides(config: DictConfig, folder: str, batches: int) -> dict[str, Run]:
    data = instantiate(config.data)
    data.setup("fit")
    images, targets = data.train_dataloader().tensors
    train = partial(_train, config, data, folder, batches)
    return {
        "bare loop": lambda: train_bare(*bare_network(config), cut(images, targets, data.batch_size, batches)),
        "lean": train,
        "self.log in every step": partial(train, log={}),
        "self.log(on_epoch=True)": partial(train, log={"on_step": False, "on_epoch": True}),
        "self.log to TensorBoard, log_every_n_steps=50": partial(train, log={}, every=50),
        "self.log to TensorBoard, log_every_n_steps=1": partial(train, log={}, every=1),
        "checkpoint after the epoch": partial(train, callback=lambda: ModelCheckpoint(tempfile.mkdtemp(dir=folder))),
        **{name: partial(train, callback=bar) for name, bar in _bars().items()},
        "all that the command uses but the checkpoint": lambda: training_seconds(
            build_trainer(config), instantiate(config.model), data
        ),
    }


def _train(
    config: DictConfig,
    data: pl.LightningDataModule,
    folder: str,
    batches: int,
    log: dict[str, Any] | None = None,
    callback: Callable[[], pl.Callback] | None = None,
    every: int | None = None,
) -> float:
    """Train with ``self.log(..., **log)``, with a callback, with TensorBoard after every so many steps."""
    callbacks = [callback()] if callback else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=batches,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder) if every else False,
        log_every_n_steps=every or 50,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return training_seconds(trainer, _Network(config, log), data.train_dataloader())


def _bars() -> dict[str, Callable[[], pl.Callback]]:
    bars: dict[str, Callable[[], pl.Callback]] = {"Lightning's bar, tqdm": TQDMProgressBar}
    if find_spec("rich") is not None:  # Lightning prefers it where it is there
        console = {"file": io.StringIO(), "force_terminal": True, "width": 120}
        bars["Lightning's bar, rich"] = partial(RichProgressBar, console_kwargs=console)
    return {**bars, "the command's bar, in a terminal": TerminalBar, "the command's lines, elsewhere": EpochLines}


class _Network(pl.LightningModule):
    """The experiment's network; ``log`` are the arguments of ``self.log`` in every step, None for no such call."""

    def __init__(self, config: DictConfig, log: dict[str, Any] | None) -> None:
        super().__init__()
        self.network, self.optimizer = bare_network(config)
        self.log_settings = log

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = F.cross_entropy(self.network(images), targets)
        if self.log_settings is not None:
            self.log("train/loss", loss, **self.log_settings)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer
