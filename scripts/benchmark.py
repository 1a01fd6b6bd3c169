"""Time what this project does against what it cannot do without.

    python scripts/benchmark.py epoch            # an epoch of mnist_bottleneck over a bare PyTorch loop
    python scripts/benchmark.py epoch --quick --json epoch.json

Both sides run in turn in one process, because a machine's speed drifts; what counts is the median of the ratios of
neighbours, with their range. Absolute times are of this machine on this day.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from mm_lightning.record import environment, write_json
from mm_lightning.train import CONF, build_trainer, quieten

TARGET = 1.10  # at most: time of an epoch of the command over the bare loop's


def main() -> None:
    """Run one benchmark, print its table and keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a fifth of each epoch, three pairs")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    quieten()
    result = BENCHMARKS[arguments.benchmark](3 if arguments.quick else arguments.repeats, arguments.quick)
    print(_table(result))
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
        ours, bare = [_lightning_epoch(config, data)], [_bare_epoch(config, data, network, batches)]  # warm-up
        for pair in range(repeats):
            runs: list[Callable[[], None]] = [
                lambda: ours.append(_lightning_epoch(config, data)),
                lambda: bare.append(_bare_epoch(config, data, network, batches)),
            ]
            for run in runs if pair % 2 == 0 else reversed(runs):  # neither side always goes first
                run()
    ratios = [one / other for one, other in zip(ours[1:], bare[1:], strict=True)]
    return {
        "benchmark": "epoch",
        "what": f"training steps of one epoch of mnist_bottleneck, {batches} batches, mixup=manifold",
        "against": "bare PyTorch loop, same tensors, network and optimizer, no mixing",
        "target": TARGET,
        "seconds": ours[1:],
        "seconds_against": bare[1:],
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


BENCHMARKS = {"epoch": epoch}


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


def _table(result: dict[str, Any]) -> str:
    ours, bare = statistics.median(result["seconds"]), statistics.median(result["seconds_against"])
    return "\n".join(
        [
            f"{result['what']}",
            f"  against: {result['against']}",
            f"  median seconds {ours:.3f} against {bare:.3f}, {len(result['seconds'])} pairs in turn",
            "  ratio {median:.3f} (range {min:.3f} to {max:.3f})".format(**result["ratio"])
            + f", target at most {result['target']}",
        ]
    )


if __name__ == "__main__":
    main()
