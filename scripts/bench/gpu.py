"""A training step on a GPU with the callback against one without, by precision and order in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

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
    rows = [step(*case, "gpu", quick) for case in cases(quick)]
    device = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    notes = ["Float32 convolutions are computed in TF32 and matrix products are not, which is PyTorch's default."]
    return {"rows": rows, "device": device, "notes": notes}


def cases(quick: bool) -> Iterator[tuple[Network, str, torch.memory_format]]:
    """Networks, precisions, and orders in memory."""
    size = {"width": 4} if quick else {}
    yield preact_resnet(100, **size), "32-true", torch.contiguous_format
    yield deep_mlp(depth=3, width=256), "32-true", torch.contiguous_format


def step(network: Network, precision: str, order: torch.memory_format, accelerator: str, quick: bool) -> dict[str, Any]:
    """One row: the seconds of a step, means over many, in turn with and without the callback."""
    network.module.to(memory_format=order)
    untimed = untimed_steps(len(network.places))
    timed = 4 if quick else 2 * DRAWN_AT_ONCE
    device = "cpu" if accelerator == "cpu" else "cuda"
    batches = RandomBatches(network.shape, network.classes, untimed + timed + 1, device)
    seeds = count()
    settings: dict[str, Any] = {"untimed": untimed, "accelerator": accelerator, "precision": precision}
    name = "channels last" if order == torch.channels_last else "channels first"
    return compare(
        f"{network.name}, {precision}" + f", {name}" * (len(network.shape) == 4),
        {
            "no mixup": lambda: mean_step(network.module, batches, **settings),
            "ManifoldMixupCallback": lambda: mean_step(
                network.module, batches, [network.callback(next(seeds))], **settings
            ),
        },
        "no mixup",
        rounds=1 if quick else 4,
        targets={"ManifoldMixupCallback": TARGET},
        batch=network.shape[0],
    )
