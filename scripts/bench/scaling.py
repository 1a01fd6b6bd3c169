"""How the cost of mixing grows: a training step of a plain MLP as one of its sizes grows."""

from __future__ import annotations

from itertools import count
from typing import Any

from bench.competitors import Textbook
from bench.fitting import RandomBatches, median_step, untimed_steps
from bench.networks import Network, deep_mlp
from bench.timing import compare

__all__ = ["measure"]

BASE = {"batch": 128, "width": 512, "classes": 10, "layers": 2}
VALUES = {
    "batch": [16, 64, 256, 1024],
    "width": [64, 256, 1024, 4096],
    "classes": [10, 100, 1_000, 10_000, 50_000],
    "layers": [1, 2, 4, 8, 16],
}
QUICK_BASE = {"batch": 16, "width": 32, "classes": 10, "layers": 2}
QUICK_VALUES = {"batch": [16, 32], "width": [32], "classes": [50], "layers": [4]}
FIT_SECONDS = 0.5  # timed, of one fit


def measure(quick: bool) -> dict[str, Any]:
    """Time a step without mixup, with the callback and with the textbook's loop."""
    base, values = (QUICK_BASE, QUICK_VALUES) if quick else (BASE, VALUES)
    rows = [_row(base, vary, value, quick) for vary in values for value in values[vary]]
    sizes = ", ".join(f"{name} {size}" for name, size in base.items())
    return {
        "rows": rows,
        "notes": [f"What does not vary is {sizes}; inputs have 784 features; every hidden layer is eligible; SGD."],
    }


def _row(base: dict[str, int], vary: str, value: int, quick: bool) -> dict[str, Any]:
    sizes = {**base, vary: value}
    network = deep_mlp(sizes["layers"], sizes["width"], sizes["classes"], sizes["batch"])
    untimed = untimed_steps(len(network.places))
    timed = 4 if quick else _steps_in(FIT_SECONDS, network)
    batches = RandomBatches(network.shape, network.classes, untimed + timed + 1)
    module, textbook, seeds = network.module, Textbook(network), count()
    sides = {
        "no mixup": lambda: median_step(module, batches, untimed=untimed),
        "ManifoldMixupCallback": lambda: median_step(module, batches, [network.callback(next(seeds))], untimed=untimed),
        "textbook": lambda: median_step(module, batches, training_step=textbook.training_step, untimed=untimed),
    }
    rounds = 2 if quick else 6
    return compare(f"{vary} {value:,}", sides, "no mixup", rounds, vary=vary, value=value, sizes=sizes)


def _steps_in(seconds: float, network: Network) -> int:
    """Steps that take about so long, 5 to 60."""
    once = median_step(network.module, RandomBatches(network.shape, network.classes, 6), untimed=2)
    return min(60, max(5, round(seconds / once)))
