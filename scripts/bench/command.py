"""The experiment mnist_bottleneck: composed and trained in this process, or run as the command in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from mm_lightning.command.configuration import CONF

__all__ = [
    "COMMAND",
    "SMALL",
    "Running",
    "Screen",
    "bare_network",
    "compose_epoch",
    "compose_experiment",
    "cut",
    "train_bare",
    "training_seconds",
]

Batches = Iterable[tuple[Tensor, Tensor]]

COMMAND = [sys.executable, "-m", "mm_lightning.train", "+experiment=mnist_bottleneck"]
SMALL = "model.blocks.sizes=[784,32,32,2,32,32,10]"  # for quick runs: the same network with fewer units


def compose_experiment(*overrides: str, name: str = "mnist_bottleneck") -> DictConfig:
    """Compose what the command composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"+experiment={name}", *overrides])


def compose_epoch(folder: str, batches: int, *overrides: str) -> DictConfig:
    """Compose one epoch of ``batches`` training batches that neither validates nor saves, as a bare loop does not."""
    return compose_experiment(
        "max_epochs=1",
        f"run_dir={folder}",
        f"+trainer.limit_train_batches={batches}",
        "+trainer.limit_val_batches=0",
        "+trainer.enable_checkpointing=false",
        "callbacks.checkpoint=null",
        *overrides,
    )


def training_seconds(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> float:
    """Fit, and return the seconds from the start of the first epoch to the end of the last one, logging included.

    What is printed goes to a screen in memory.
    """
    clock = _TrainingClock()
    trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]  # before diagnostics that look when training ends
    with redirect_stdout(Screen()):
        trainer.fit(module, data)
    return clock.seconds


class Screen(io.StringIO):
    """Takes what would be drawn on a terminal, so that drawing is paid for and the terminal is not."""

    def isatty(self) -> bool:
        """Say that it is a terminal: bars are drawn differently elsewhere."""
        return True


class _TrainingClock(pl.Callback):
    """Time from the start of training to its end, without what ``Trainer.fit`` does before and after."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._begin


def bare_network(config: DictConfig) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """The experiment's network and optimizer, without Lightning."""
    network = nn.Sequential(*instantiate(config.model).blocks)
    return network, instantiate(config.optimizer)(network.parameters())


def cut(inputs: Tensor, targets: Tensor, batch_size: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut shuffled batches from tensors, up to so many; the first one is cut when it is asked for."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    for rows in order.split(batch_size)[:batches]:
        yield inputs[rows], targets[rows]


def train_bare(network: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> float:
    """Train in a plain loop and return its seconds."""
    begin = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return time.perf_counter() - begin


class Running:
    """A process that was started: its output is kept for the case that it fails.

    Args:
        arguments: The command line.
        folder: Working directory; ``output.txt`` in it gets what the process prints.
        threads: ``OMP_NUM_THREADS`` of the process; None leaves it as it is here.
        path: Folders that the process finds modules in, too.
    """

    def __init__(
        self, arguments: list[str], folder: str, threads: int | None = None, path: tuple[Path, ...] = ()
    ) -> None:
        environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        found = [*map(str, path), *filter(None, [environment.get("PYTHONPATH")])]
        self.arguments = arguments
        self.output = Path(folder, "output.txt")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                arguments,
                cwd=folder,
                env={**environment, "PYTHONPATH": os.pathsep.join(found)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            RuntimeError: If the process failed.
        """
        try:
            code = self.process.wait()
        except BaseException:  # Ctrl-C: leave nothing running
            self.process.kill()
            raise
        if code:
            last = self.output.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(self.arguments)} ended with exit code {code}: {' '.join(last)}")
