"""An epoch of mnist_bottleneck, trained as the command trains it, against a bare PyTorch loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from hydra.utils import instantiate

from bench.command import SMALL, bare_network, compose_epoch, cut, train_bare, training_seconds
from bench.timing import compare
from mm_lightning.command.train import build_trainer
from mm_lightning.fast_cpu import fast_products, keep_freed_memory

__all__ = ["measure"]

TARGETS = {"mixup=manifold": 1.10}  # at most: an epoch with everything the command does in it over the bare loop's


def measure(quick: bool) -> dict[str, Any]:
    """Time the training steps of an epoch, with everything that the command logs, and the bare loop's.

    Both train the same network on the same tensors with the same optimizer; the bare loop does not mix, log or save.
    Validation, checkpoints and diagnostics are left out on both sides.
    """
    batches, rounds = (60, (2, 2)) if quick else (500, (3, 5))
    with tempfile.TemporaryDirectory() as folder:
        sides = _sides(folder, batches, quick)
        row = partial(compare, sides=sides, against="bare loop", targets=TARGETS, warmup=not quick, batches=batches)
        rows = [row("as PyTorch comes", rounds=rounds[0])]
        keeps = keep_freed_memory()  # for the rest of the process, so this row comes last
        with fast_products() as is_fast:
            rows.append(row("with fast_cpu", rounds=rounds[1]))
    notes = [
        "with fast_cpu: fast_products() and keep_freed_memory() on all sides, the bare loop among them.",
        "The callback's look at the first batch, once a run, is in every timed epoch of mixup=manifold.",
    ]
    if not (keeps and is_fast):
        notes.append(f"fast_cpu was in part without effect here: products {is_fast}, memory {keeps}.")
    return {"rows": rows, "notes": notes}


def _sides(folder: str, batches: int, quick: bool) -> dict[str, Callable[[], float]]:
    small = [SMALL, "data.limit=6000"] if quick else []
    configs = {name: compose_epoch(folder, batches, f"mixup={name}", *small) for name in ("none", "manifold")}
    config = configs["none"]
    data = instantiate(config.data)
    data.setup("fit")
    images, targets = data.train_dataloader().tensors

    def bare() -> float:
        return train_bare(*bare_network(config), cut(images, targets, config.data.batch_size, batches))

    def command(mixup: str) -> float:
        return training_seconds(build_trainer(configs[mixup]), instantiate(configs[mixup].model), data)

    return {"bare loop": bare} | {f"mixup={name}": partial(command, name) for name in configs}
