"""Time what this project does against what it cannot do without.

    python scripts/benchmark.py epoch            # an epoch of mnist_bottleneck over a bare PyTorch loop
    python scripts/benchmark.py step             # a training step with the callback over one without it
    python scripts/benchmark.py step --quick --json step.json

Both sides run in turn in one process, because a machine's speed drifts; what counts is the median of the ratios of
neighbours, with their spread. Absolute times are of this machine on this day.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mm_lightning import ManifoldMixupCallback
from mm_lightning.record import environment, write_json
from mm_lightning.train import CONF, build_trainer, quieten

TARGET = 1.10  # at most: time of an epoch of the command over the bare loop's
PAIRS = {"epoch": 5, "step": 40}  # pairs of runs; those of a step are short
UNTIMED, TIMED = 6, 20  # steps of one such run; among the first ones are the mixes that are looked at closely


def main() -> None:
    """Run one benchmark, print its table and keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--repeats", type=int, help=f"pairs of runs (default: {PAIRS})")
    parser.add_argument("--quick", action="store_true", help="a fifth of each epoch, and three pairs")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    quieten()
    repeats = 3 if arguments.quick else arguments.repeats or PAIRS[arguments.benchmark]
    result = BENCHMARKS[arguments.benchmark](repeats, arguments.quick)
    for comparison in result.get("networks", [result]):
        print(_table(comparison))
    if arguments.json:
        write_json(arguments.json, {**result, "threads": torch.get_num_threads(), **environment()})


def epoch(repeats: int, quick: bool) -> dict[str, Any]:
    """Time the training steps of an epoch, with manifold mixup and everything the command logs, and the bare loop."""
    batches = 100 if quick else 500
    with tempfile.TemporaryDirectory() as folder:
        config = _compose(folder, batches)
        data = instantiate(config.data)
        data.setup("fit")
        network = instantiate(config.model)
        ours, bare = _in_turn(
            lambda: _lightning_epoch(config, data), lambda: _bare_epoch(config, data, network, batches), repeats
        )
    return {
        "benchmark": "epoch",
        "what": f"training steps of one epoch of mnist_bottleneck, {batches} batches, mixup=manifold",
        "against": "bare PyTorch loop, same tensors, network and optimizer, no mixing",
        "target": TARGET,
        "seconds": ours,
        "seconds_against": bare,
        "ratio": _ratio(ours, bare),
    }


def step(repeats: int, quick: bool) -> dict[str, Any]:
    """Time a training step with the callback and without it: short runs of one module, under trainers alike."""
    with tempfile.TemporaryDirectory() as folder:
        config = _compose(folder, batches=1)
        networks = [
            (
                "MixableModule of mnist_bottleneck, batches of 100 x 1 x 28 x 28",
                instantiate(config.model),
                (100, 1, 28, 28),
                lambda seed: instantiate(config.mixup, seed=seed),
            ),
            (
                "residual network in a LightningModule, batches of 64 x 3 x 32 x 32",
                _ResidualNetwork(),
                (64, 3, 32, 32),
                lambda seed: ManifoldMixupCallback(layers=["input", "stage1", "stage2"], seed=seed),
            ),
        ]
    return {"benchmark": "step", "networks": [_compare_steps(*network, repeats) for network in networks]}


BENCHMARKS = {"epoch": epoch, "step": step}


def _in_turn(ours: Callable[[], float], against: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each side's runs, after one of each that does not count."""
    sides: list[tuple[Callable[[], float], list[float]]] = [(ours, []), (against, [])]
    for run, _ in sides:
        run()
    for pair in range(pairs):
        for run, seconds in sides if pair % 2 == 0 else reversed(sides):  # neither side always goes first
            seconds.append(run())
    return sides[0][1], sides[1][1]


def _ratio(ours: list[float], against: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(ours, against, strict=True)]
    lower, median, upper = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "min": min(ratios), "max": max(ratios)}


def _compose(folder: str, batches: int) -> DictConfig:
    overrides = ["+experiment=mnist_bottleneck", "max_epochs=1", f"run_dir={folder}"]
    overrides += [
        f"+trainer.limit_train_batches={batches}",
        "+trainer.limit_val_batches=0",  # the loop that it is compared with does not validate or save either
        "+trainer.enable_checkpointing=false",
        "callbacks.checkpoint=null",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides)


def _lightning_epoch(config: DictConfig, data: pl.LightningDataModule) -> float:
    clock = _Clock()
    trainer = build_trainer(config, extra=[clock])
    trainer.fit(instantiate(config.model), data)
    return clock.seconds


class _Clock(pl.Callback):
    """Time from the first to the last training step of an epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._begin


def _bare_epoch(config: DictConfig, data: Any, model: Any, batches: int) -> float:
    network = nn.Sequential(*model.blocks)
    optimizer = instantiate(config.optimizer)(network.parameters())
    images, labels = data.train_dataloader().tensors
    begin = time.perf_counter()
    order = torch.randperm(len(images))
    for rows in order.split(config.data.batch_size)[:batches]:
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    return time.perf_counter() - begin


def _compare_steps(
    what: str,
    module: pl.LightningModule,
    shape: tuple[int, ...],
    mixup: Callable[[int], pl.Callback],
    repeats: int,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand(shape, generator=generator), torch.randint(10, shape[:1], generator=generator))
        for _ in range(UNTIMED + TIMED + 1)  # a step is timed to the next one's start
    ]
    seeds = count()
    ours, without = _in_turn(
        lambda: _median_step(module, batches, [mixup(next(seeds))]), lambda: _median_step(module, batches, []), repeats
    )
    return {
        "what": f"training step with manifold mixup: {what}",
        "against": "the same module and trainer without the callback",
        "steps": TIMED,
        "seconds": ours,
        "seconds_against": without,
        "ratio": _ratio(ours, without),
    }


def _median_step(module: pl.LightningModule, batches: list[tuple[Tensor, Tensor]], callbacks: list[Any]) -> float:
    clock = _StepClock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # no validation and no workers, on purpose
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return statistics.median(end - begin for begin, end in pairwise(clock.starts[UNTIMED:]))


class _StepClock(pl.Callback):
    """When each training step began."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.starts.append(time.perf_counter())


class _ResidualNetwork(pl.LightningModule):
    """Three stages of one residual block each; a stage's end is a place that everything runs through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stage1, self.stage2, self.stage3 = _ResidualBlock(16, 16), _ResidualBlock(16, 32), _ResidualBlock(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return self.head(hidden.mean(dim=(2, 3)))  # (N, C, H, W) -> (N, C)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return F.cross_entropy(self(images), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut. A change of channels halves height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.convolutions(hidden) + self.shortcut(hidden))


def _table(result: dict[str, Any]) -> str:
    ours, against = statistics.median(result["seconds"]), statistics.median(result["seconds_against"])
    target = f", target at most {result['target']}" if "target" in result else ""
    return "\n".join(
        [
            f"{result['what']}",
            f"  against: {result['against']}",
            f"  median seconds {ours:.4g} against {against:.4g}, {len(result['seconds'])} pairs in turn",
            "  ratio {median:.3f} (quartiles {lower_quartile:.3f} and {upper_quartile:.3f}, ".format(**result["ratio"])
            + "range {min:.3f} to {max:.3f})".format(**result["ratio"])
            + target,
        ]
    )


if __name__ == "__main__":
    main()
