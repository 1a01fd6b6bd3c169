"""A training step on a GPU with the callback against one without."""

from __future__ import annotations

from itertools import count
from typing import Any

import lightning.pytorch as pl
import torch

from bench.fitting import RandomBatches, mean_step, untimed_steps
from bench.networks import Network, deep_mlp, preact_resnet
from bench.timing import compare

__all__ = ["measure"]

TARGET = 1.02  # of the callback, at most
DRAWN_AT_ONCE = 32  # plans: a multiple of it holds its share of the draw


def measure(quick: bool) -> dict[str, Any]:
    """Time the steps of the paper's network, and of an MLP whose operations are too small to keep a GPU busy."""
    if not torch.cuda.is_available():
        raise SystemExit(f"The benchmark gpu needs a CUDA device, and torch {torch.__version__} finds none.")
    rows = [step(network, "gpu", quick) for network in networks(quick)]
    device = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    notes = ["Float32 convolutions are computed in TF32 and matrix products are not, which is PyTorch's default."]
    return {"rows": rows, "device": device, "notes": notes}


def networks(quick: bool) -> list[Network]:
    """The paper's network, and a small MLP."""
    return [preact_resnet(100, **({"width": 4} if quick else {})), deep_mlp(depth=3, width=256)]


def step(network: Network, accelerator: str, quick: bool) -> dict[str, Any]:
    """One row: the seconds of a float32 step, means over many, in turn with and without the callback."""
    untimed = untimed_steps(len(network.places))
    timed = 4 if quick else 2 * DRAWN_AT_ONCE
    batches = RandomBatches(
        network.shape, network.classes, untimed + timed + 1, "cpu" if accelerator == "cpu" else "cuda"
    )
    seeds = count()

    def run(*callbacks: pl.Callback) -> float:
        return mean_step(network.module, batches, callbacks, untimed=untimed, accelerator=accelerator)

    return compare(
        network.name,
        {"no mixup": run, "ManifoldMixupCallback": lambda: run(network.callback(next(seeds)))},
        "no mixup",
        rounds=1 if quick else 4,
        targets={"ManifoldMixupCallback": TARGET},
        batch=network.shape[0],
    )
