"""Seconds of a training step within a Lightning Trainer."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["RandomBatches", "mean_step", "median_step", "untimed_steps"]

_DIFFERENT = 4  # batches


class RandomBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of uniform numbers and random classes, each handed out as a copy: some mixup works in place.

    Args:
        shape: Of a batch of inputs, (N, ...).
        classes: Number of classes.
        count: Batches of an epoch.
        device: That they are on, so that no copy from one device to another is timed.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, count: int, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        self.count = count
        self.batches = []
        for _ in range(_DIFFERENT):
            inputs = torch.rand(shape, generator=generator)
            targets = torch.randint(classes, shape[:1], generator=generator)
            self.batches.append((inputs.to(device), targets.to(device)))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs (N, ...) and class indices (N,)."""
        inputs, targets = self.batches[index % _DIFFERENT]
        return inputs.clone(), targets.clone()


def untimed_steps(layers: int) -> int:
    """First steps of a fit that do not count, where so many layers are eligible.

    The first two batches are looked at closely, and the first mixes of each layer compiled. After four times as many
    steps as there are layers few are left, and the median is none of them.
    """
    return max(6, 4 * layers)


def median_step(
    module: pl.LightningModule,
    batches: RandomBatches,
    callbacks: Sequence[pl.Callback] = (),
    training_step: Callable[..., Any] | None = None,
    *,
    untimed: int,
) -> float:
    """Train for an epoch, and return the median seconds from one step's start to the next one's.

    In one of 32 steps the callback draws the plans of the next 32; the median is none of these.

    Args:
        module: What is trained; it goes on from where it was.
        batches: The epoch, of at least ``untimed`` + 2 batches.
        callbacks: Of the trainer.
        training_step: Takes the place of the module's own.
        untimed: First steps that do not count.
    """
    starts = _starts_of_steps(module, batches, callbacks, training_step)[untimed:]
    return statistics.median(end - begin for begin, end in pairwise(starts))


def mean_step(
    module: pl.LightningModule,
    batches: RandomBatches,
    callbacks: Sequence[pl.Callback] = (),
    training_step: Callable[..., Any] | None = None,
    *,
    untimed: int,
    **settings: Any,
) -> float:
    """As :func:`median_step`, but the mean: of a multiple of 32 steps, with its share of the plans' draw.

    On a GPU the clock is read when it has finished, at the first and the last of these steps; between, nothing waits.
    ``settings`` are of the trainer.
    """
    waits = {untimed, len(batches) - 1}
    starts = _starts_of_steps(module, batches, callbacks, training_step, waits, **settings)[untimed:]
    return (starts[-1] - starts[0]) / (len(starts) - 1)


def _starts_of_steps(
    module: pl.LightningModule,
    batches: RandomBatches,
    callbacks: Sequence[pl.Callback],
    training_step: Callable[..., Any] | None,
    waits: Collection[int] = (),
    **settings: Any,
) -> list[float]:
    clock = _StepClock(waits)
    trainer = pl.Trainer(
        devices=1,
        max_epochs=1,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", **settings},
    )
    with _trained_by(module, training_step), warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # no validation and no workers, on purpose
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return clock.starts


@contextmanager
def _trained_by(module: pl.LightningModule, training_step: Callable[..., Any] | None) -> Iterator[None]:
    if training_step is None:
        yield
        return
    module.training_step = training_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.training_step


class _StepClock(pl.Callback):
    """When each training step began; for the steps ``waits``, when a GPU had done all before."""

    def __init__(self, waits: Collection[int]) -> None:
        self.starts: list[float] = []
        self.waits = waits

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda" and len(self.starts) in self.waits:
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())
