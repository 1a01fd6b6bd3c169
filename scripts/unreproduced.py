"""The two published findings that did not reproduce: under which settings they would.

    python scripts/unreproduced.py               # what is missing of docs/results/unreproduced.json, and the tables
    python scripts/unreproduced.py --minutes 10  # no run is begun after that
    python scripts/unreproduced.py --tables      # the tables of docs/unreproduced.md once more, from the numbers

Ctrl-C and the same command again: it goes on with the run at which it stopped. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import between_marks
from unreproduced_runs import Settings, record_of, run
from unreproduced_spirals import geometry
from unreproduced_tables import tables

from mm_lightning.command.run_folder import environment
from mm_lightning.fast_cpu import fast_products, keep_freed_memory
from mm_lightning.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results/unreproduced.json", ROOT / "docs/unreproduced.md"


class Run(NamedTuple):
    """One training of the grid: what is changed, and by what it is regularised."""

    group: str
    change: str
    method: str
    settings: Settings
    seed: int


MNIST = Settings()
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "bottleneck": {"mix_before": (4,)},
    "first": {"mix_before": (1,)},
    "input": {"mix_before": (0,)},
    "weight decay": {"weight_decay": 1e-4},
    "dropout": {"dropout": 0.5},
}
PLACES: dict[str, dict[str, Any]] = {
    "second": {"mix_before": (2,)},
    "before the bottleneck": {"mix_before": (3,)},
    "input to bottleneck": {"mix_before": (0, 1, 2, 3, 4)},
    "stronger weight decay": {"weight_decay": 1e-3},
}
CHANGES: dict[str, dict[str, Any]] = {
    "inputs normalised": {"inputs": "normalised"},
    "SGD 0.1": {"optimizer": "SGD", "lr": 0.1},
    "SGD 0.01": {"optimizer": "SGD", "lr": 0.01},
    "40 epochs": {"epochs": 40},
    "learning rate 3e-3": {"lr": 3e-3},
    "PyTorch's first weights": {"init": "PyTorch"},
    "BCE of the softmax": {"loss": "BCE"},
    "the same batches in all epochs": {"reshuffled": False},
}
OF_MIXING: dict[str, dict[str, Any]] = {
    "alpha 1": {"alpha": 1.0},
    "alpha 6": {"alpha": 6.0},
    "lam of each row": {"per_sample": True},
    "mixed for 80 % of training": {"until": 0.8},
}
FEW = {method: METHODS[method] for method in ("none", "bottleneck", "first")}
FULL = replace(MNIST, images=50_000, epochs=6)
TWENTY = "20 units after the first layer"
WIDE = replace(MNIST, sizes=(784, 1024, 20, 1024, 1024, 1024, 1024, 10), epochs=6)
# Sizes, and the block that follows the narrow or the first hidden layer.
NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {
    "30 units after three layers": ((784, 256, 256, 256, 30, 256, 256, 256, 256, 10), 4),
    "30 units first": ((784, 30, 256, 256, 256, 256, 10), 1),
    "12 units first": ((784, 12, 256, 256, 256, 256, 10), 1),
    "no bottleneck, mixed in the first layer": ((784, 256, 256, 256, 256, 10), 1),
}
SPIRAL = Settings(sizes=(2, *[256] * 7, 2), lr=5e-4, epochs=16, batch=20, alpha=1.0)
SPIRAL_METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "input": {"mix_before": (0,)},
    "hidden": {"mix_before": (4, 5, 6, 7)},
}
INPUT_CHANGES: dict[str, dict[str, Any]] = {
    "alpha 0.1": {"alpha": 0.1},
    "alpha 0.2": {"alpha": 0.2},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 2": {"alpha": 2.0},
    "64 epochs": {"epochs": 64},
    "mixed for 80 % of training": {"until": 0.8},
    "mixed for half of training": {"until": 0.5},
    "1.5 turns": {"turns": 1.5},
    "noise 0": {"noise": 0.0},
}
BOTTLENECK_2D = replace(SPIRAL, sizes=(2, 256, 256, 256, 2, 256, 256, 256, 2))
TWO_UNITS: dict[str, dict[str, Any]] = {
    "1 turn": {"turns": 1.0},
    "1 turn, 160 epochs": {"turns": 1.0, "epochs": 160},
}
GEOMETRY = [
    (alpha, noise, turns)
    for turns in (780 / 360, 1.5, 1.0)
    for noise in (0.9, 0.0)
    for alpha in (0.1, 0.2, 0.5, 1.0, 2.0)
]
# What comes nearest to the published numbers, with all methods.
NEAREST: dict[str, tuple[int, ...]] = {
    f"{units} units after the first layer": (784, 256, units, 256, 256, 256, 256, 10) for units in (12, 16, 20, 30)
}


def grid() -> Iterator[Run]:
    """All runs, in the order in which they are made."""
    for method, how in (METHODS | PLACES).items():
        yield Run("flatness", "", method, replace(MNIST, **how), 0)
    for method, how in SPIRAL_METHODS.items():
        yield Run("spirals", "", method, replace(SPIRAL, **how), 0)
    for change, what in TWO_UNITS.items():
        for method, how in METHODS.items():
            if method != "first":
                yield Run("two units", change, method, replace(BOTTLENECK_2D, **{**what, **how}), 0)
    for change, what in list(CHANGES.items())[:3]:
        for method, how in FEW.items():
            yield Run("flatness", change, method, replace(MNIST, **{**what, **how}), 0)
    for change, (sizes, place) in NETWORKS.items():
        for method, how in {"none": {}, "input": {"mix_before": (0,)}, "narrow": {"mix_before": (place,)}}.items():
            yield Run("networks", change, method, replace(MNIST, sizes=sizes, **how), 0)
    for change, sizes in NEAREST.items():
        for method, how in METHODS.items():
            if method not in ("bottleneck", "first"):
                yield Run("networks", change, method, replace(MNIST, sizes=sizes, **how), 0)
        yield Run("networks", change, "narrow", replace(MNIST, sizes=sizes, mix_before=(2,)), 0)
    for change, what in INPUT_CHANGES.items():
        yield Run("spirals", change, "input", replace(SPIRAL, **{"mix_before": (0,), **what}), 0)
    for seed in (0, 1, 2):
        for method, how in SPIRAL_METHODS.items():
            yield Run("spirals", "1 turn", method, replace(SPIRAL, turns=1.0, **how), seed)
    for seed in (1, 2):
        for method, how in METHODS.items():
            if method not in ("bottleneck", "first"):
                yield Run("networks", TWENTY, method, replace(MNIST, sizes=NEAREST[TWENTY], **how), seed)
        yield Run("networks", TWENTY, "narrow", replace(MNIST, sizes=NEAREST[TWENTY], mix_before=(2,)), seed)
    for change, what in list(CHANGES.items())[3:]:
        for method, how in FEW.items():
            yield Run("flatness", change, method, replace(MNIST, **{**what, **how}), 0)
    for seed in (1, 2):
        for change in ("alpha 0.2", "mixed for half of training", "1.5 turns"):
            settings = replace(SPIRAL, **{"mix_before": (0,), **INPUT_CHANGES[change]})
            yield Run("spirals", change, "input", settings, seed)
    for change, what in OF_MIXING.items():
        for method in ("bottleneck", "first"):
            yield Run("flatness", change, method, replace(MNIST, **{**what, **METHODS[method]}), 0)
    for method, how in {"none": {}, "narrow": {"mix_before": (2,)}}.items():
        yield Run("networks", f"{TWENTY}, others of 1,024, 6 epochs", method, replace(WIDE, **how), 0)
        settings = replace(FULL, sizes=NEAREST[TWENTY], **how)
        yield Run("networks", f"{TWENTY}, 50,000 images, 6 epochs", method, settings, 0)
    for seed in (1, 2):
        yield Run("spirals", "alpha 0.1", "input", replace(SPIRAL, mix_before=(0,), alpha=0.1), seed)
        for method in ("none", "input"):
            yield Run("spirals", "", method, replace(SPIRAL, **SPIRAL_METHODS[method]), seed)
    yield Run("spirals", "64 epochs", "input", replace(SPIRAL, mix_before=(0,), epochs=64), 1)


def measure(content: dict[str, Any], begins_until: float) -> Iterator[None]:
    """Make what is missing, and stop after each."""
    for alpha, noise, turns in GEOMETRY:
        told = {"alpha": alpha, "noise": noise, "turns": turns}
        if not any(told.items() <= record.items() for record in content["geometry"]):
            content["geometry"].append({**told, **geometry(alpha, noise, turns)})
            yield
    done = {json.dumps([record["settings"], record["seed"]]) for record in content["runs"]}
    for group, change, method, settings, seed in grid():
        told = record_of(settings, seed)
        if (key := json.dumps([told["settings"], seed])) in done:
            continue
        if time.monotonic() > begins_until:
            return
        begin = time.perf_counter()
        numbers = run(settings, seed)
        seconds = round(time.perf_counter() - begin, 1)
        content["runs"].append(
            {"group": group, "change": change, "method": method, **told, "seconds": seconds, **numbers}
        )
        done.add(key)
        print(f"{group} / {change} / {method} / {seed}: {100 * numbers['test_acc']:.2f} %, {seconds} s", flush=True)
        yield


def write(content: dict[str, Any]) -> None:
    """Write the results, one run or geometry a line; NaN becomes null."""
    known = {"command": "python scripts/unreproduced.py", **environment()}
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in known.items()]
    for name in ("runs", "geometry"):
        lines = ",\n".join(json.dumps(_finite(record), allow_nan=False) for record in content[name])
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    with whole_file(RESULTS) as file:
        file.write(("{" + ",\n".join(parts) + "}\n").encode())


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def main() -> None:
    """Run what is not there yet, and write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e6, help="no run is begun after these")
    parser.add_argument("--tables", action="store_true", help="runs nothing")
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": [], "geometry": []}
    if not arguments.tables:
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.set_num_threads(1)
        keep_freed_memory()
        with fast_products():
            for _ in measure(content, time.monotonic() + 60 * arguments.minutes):
                write(content)
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables(content).items():
        page = between_marks(page, name, table)
    with whole_file(PAGE) as file:
        file.write(page.encode())


if __name__ == "__main__":
    main()
