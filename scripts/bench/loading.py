"""Batches cut from tensors in memory against DataLoaders, alone and under a training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bench.command import SMALL, bare_network, compose_experiment, train_bare
from bench.straightforward import Images
from bench.timing import compare
from mm_lightning.data import TensorDataModule, load_mnist

__all__ = ["measure"]

SMALL_SPIRALS = "model.blocks.sizes=[2,32,32,32,32,32,32,32,2]"
NOTES = [
    "The DataLoaders' workers are persistent and were started before: the first epoch does not count.",
    "The networks train as PyTorch comes, without fast_cpu; in faster steps the loading weighs more.",
    "The images of the DataLoaders are uint8 and made floats row by row, as ToTensor does; the tensors are floats.",
]


def measure(quick: bool) -> dict[str, Any]:
    """Time one epoch of batches of MNIST and of the spirals, without a network and with it in a bare loop."""
    limit = 600 if quick else None
    mnist = compose_experiment(f"data.limit={limit or 'null'}", *[SMALL] * quick)
    points = f"data.num_points={100 if quick else 2000}"
    spirals = compose_experiment(points, *[SMALL_SPIRALS] * quick, name="spiral")
    tensors = _set_up(mnist)
    raw = load_mnist()
    num_images = len(tensors.train_dataloader().tensors[0])
    images = Images(raw.train_images[:num_images], raw.train_labels[:num_images])
    spiral_tensors = _set_up(spirals)
    rows = [
        *_compare("MNIST", mnist, tensors, images, rounds=(2, 2) if quick else (10, 4)),
        *_compare(
            "spirals",
            spirals,
            spiral_tensors,
            TensorDataset(*spiral_tensors.train_dataloader().tensors),
            rounds=(2, 2) if quick else (20, 4),
        ),
    ]
    return {"rows": rows, "notes": NOTES}


def _set_up(config: DictConfig) -> TensorDataModule:
    data: TensorDataModule = instantiate(config.data)
    data.setup("fit")
    return data


def _compare(
    name: str, config: DictConfig, data: TensorDataModule, dataset: Dataset[Any], rounds: tuple[int, int]
) -> list[dict[str, Any]]:
    """The row of the batches alone, and that of training on them; ``rounds`` of each."""
    size = config.data.batch_size
    loaders: dict[str, Any] = {"tensor batches": data.train_dataloader()}
    for workers in (0, 2):
        loaders[f"DataLoader, {workers} workers"] = DataLoader(
            dataset, size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
    facts = {"batches": len(loaders["tensor batches"]), "batch_size": size}
    runs: dict[str, Callable[[Any], float]] = {
        "batches alone": _seconds_of_batches,
        "with its network": lambda loader: train_bare(*bare_network(config), loader),
    }
    return [
        compare(
            f"{name}, {what}",
            {side: partial(run, loader) for side, loader in loaders.items()},
            against="tensor batches",
            rounds=number,
            **facts,
        )
        for (what, run), number in zip(runs.items(), rounds, strict=True)
    ]


def _seconds_of_batches(loader: Iterable[Any]) -> float:
    begin = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begin
