"""A training step with few and with many eligible layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import lightning.pytorch as pl
from torch import nn

from bench.fitting import RandomBatches, median_step, untimed_steps
from bench.networks import DeepMLP
from bench.timing import compare
from mm_lightning import ManifoldMixupCallback

__all__ = ["eligible_layers", "measure"]

DEPTH, BATCH_SIZE = 16, 100
UNUSED = 500  # modules that do nothing, in the network of the last side


def measure(quick: bool) -> dict[str, Any]:
    """Time a step with 1 to 16 eligible layers of 16, and with one in a network of many more modules."""
    width, timed, rounds = (32, 4, 2) if quick else (256, 60, 30)
    untimed = 2 if quick else untimed_steps(DEPTH)  # on all sides alike
    batches = RandomBatches((BATCH_SIZE, 784), 10, untimed + timed + 1)
    module, padded = DeepMLP(DEPTH, width), DeepMLP(DEPTH, width)
    padded.unused = nn.ModuleList(nn.Identity() for _ in range(UNUSED))
    seeds = count()

    def run(module: pl.LightningModule, eligible: int) -> float:
        mixup = ManifoldMixupCallback(layers=eligible_layers(eligible), seed=next(seeds), schedule=None)
        return median_step(module, batches, [mixup], untimed=untimed)

    sides: dict[str, Callable[[], float]] = {
        f"{eligible} layer{'s' * (eligible > 1)}": partial(run, module, eligible) for eligible in (1, 2, 4, 8, 16)
    }
    sides[f"1 layer, {UNUSED} unused modules"] = partial(run, padded, 1)
    case = f"MLP, {DEPTH} x {width}, batch {BATCH_SIZE}"
    row = compare(case, sides, "1 layer", rounds, batch=BATCH_SIZE, depth=DEPTH, width=width)
    return {
        "rows": [row],
        "notes": [f"The unused modules are {UNUSED} nn.Identity, which the forward pass never runs."],
    }


def eligible_layers(eligible: int) -> list[str]:
    """So many layers, evenly spaced, of which the last one is the network's."""
    every = DEPTH // eligible
    return [f"hidden.{i}" for i in range(every - 1, DEPTH, every)]
