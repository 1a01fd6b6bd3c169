"""What the look before the first training step costs: its time in forward passes, and its memory at the peak.

Each first step is taken in a process of its own, because a second one would find caches filled and memory at hand:

    PYTHONPATH=scripts python -m bench.look "frozen backbone" numbers.json --mixup
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.utils.data import DataLoader

from bench.command import Running
from bench.fitting import RandomBatches
from bench.networks import Classifier, bottleneck_resnet, frozen_backbone, transformer
from bench.timing import Run, compare, ratio, wall_seconds
from mm_lightning import ManifoldMixupCallback

__all__ = ["first_step", "measure", "output_bytes", "peak_bytes"]


class Case(NamedTuple):
    """A network, and the shape of its batch, (N, ...)."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "frozen backbone": Case(partial(frozen_backbone, depth=60, width=1024), (8, 1024)),
    "ResNet50": Case(bottleneck_resnet, (16, 3, 32, 32)),
    "transformer": Case(partial(transformer, depth=14, width=768, heads=12, length=32), (4, 32, 768)),
}
QUICK_CASES = {
    "frozen backbone": Case(partial(frozen_backbone, depth=10, width=32), (8, 32)),
    "ResNet50": Case(partial(bottleneck_resnet, depths=(1, 1, 1, 1), width=4), (8, 3, 8, 8)),
    "transformer": Case(partial(transformer, depth=4, width=16, heads=2, length=4), (8, 4, 16)),
}
PLAIN, MIXED = "no mixup", "ManifoldMixupCallback"
SPARE_PASSES = 3  # that the look may take beside one for each eligible layer
ROUNDS, MEMORY_ROUNDS, FORWARD_PASSES = 9, 3, 7
MAPPED_BYTES = 16_384  # from here on memory is mapped for each tensor, and given back when it is freed

Found = dict[str, list[dict[str, Any]]]
"""For each side what :func:`first_step` returned in each round."""


def measure(quick: bool) -> dict[str, Any]:
    """Take the first step of each network with the callback and without, for its time and for its memory."""
    steps, looks, peaks, memory = [], [], [], []
    for case in CASES:
        step, timed = _in_turn(case, quick)
        steps.append(step)
        looks.append(_look_row(case, timed, quick))
        weighed = timed if quick else _in_turn(case, quick, is_memory=True)[1]
        peaks.append(_peak_row(case, weighed, quick))
        memory.append(_memory(case, weighed))
    notes = [
        "The look is what the first step takes with the callback beyond the plain one; a forward pass is one of the "
        f"plain step, later. The target is one for each eligible layer and {SPARE_PASSES} more.",
        "Memory is what becomes resident in a fit of one step, at its peak, in a process that gives back at once what "
        f"it frees, from {MAPPED_BYTES // 1024} kB on. The callback may add what the module's buffers and one output "
        "of each eligible layer take.",
        "Each process first fits a small network of the kind with the callback, so that no imports count.",
    ]
    if quick:
        notes.append("A quick run takes all steps in one process, where memory freed by one is there for the next.")
    return {"rows": [*steps, *looks, *peaks], "memory": memory, "notes": notes}


def first_step(case: str, mixup: bool, quick: bool) -> dict[str, Any]:
    """Take the first step of a network, in this process.

    Returns:
        ``step_seconds``; ``forward_seconds``, the median of some forward passes after it; ``peak_bytes`` of the fit;
        ``layers``, the names of the eligible ones; ``buffers_bytes`` of the module; ``outputs_bytes`` of these layers.
    """
    for warm_up in (ManifoldMixupCallback(), None):  # imports what is imported late
        _fit(*_made(QUICK_CASES[case]), warm_up)
    module, batches = _made((QUICK_CASES if quick else CASES)[case])
    callback = ManifoldMixupCallback(seed=0, schedule=None) if mixup else None
    steps: list[float] = []
    gc.collect()
    peak = peak_bytes(lambda: steps.append(_fit(module, batches, callback)))
    passes = [wall_seconds(lambda: module.training_step(batches[0], 0)) for _ in range(FORWARD_PASSES)]
    layers = [] if callback is None else list(callback.layer_names)
    return {
        "step_seconds": steps[0],
        "forward_seconds": statistics.median(passes),
        "peak_bytes": peak,
        "layers": layers,
        "buffers_bytes": sum(buffer.nbytes for buffer in module.buffers()),
        "outputs_bytes": output_bytes(module, batches[0], layers),
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that become resident at a time during a call, beyond those that are resident before it.

    Linux keeps the peak, and begins anew when told to. Elsewhere it is what the call adds to the process' peak so far.
    """
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before = _peak()
    call()
    return _peak() - before


def output_bytes(module: pl.LightningModule, batch: Any, layers: Sequence[str]) -> int:
    """Bytes of what the layers return for a batch, together; the layer ``"input"`` stands for the inputs."""
    found = [batch[0].nbytes] if "input" in layers else []
    parts = [module.get_submodule(layer) for layer in layers if layer != "input"]
    handles = [part.register_forward_hook(lambda *seen: found.append(seen[-1].nbytes)) for part in parts]
    with torch.no_grad():
        module.training_step(batch, 0)
    for handle in handles:
        handle.remove()
    return sum(found)


def _peak() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _made(case: Case) -> tuple[pl.LightningModule, RandomBatches]:
    torch.manual_seed(0)
    return Classifier(case.network()), RandomBatches(case.shape, classes=10, count=1)


def _fit(module: pl.LightningModule, batches: RandomBatches, mixup: pl.Callback | None) -> float:
    """Train for one step, and return its seconds."""
    clock = _StepClock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[clock, *([] if mixup is None else [mixup])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # no validation and no workers, on purpose
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return clock.seconds


class _StepClock(pl.Callback):
    """The seconds of the last training step."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - self.begin


def _in_turn(case: str, quick: bool, is_memory: bool = False) -> tuple[dict[str, Any], Found]:
    """Take first steps of both sides; return the row of their times, and all that was found."""
    found: Found = {PLAIN: [], MIXED: []}

    def take(side: str) -> float:
        mixup = side == MIXED
        numbers = first_step(case, mixup, quick) if quick else _in_a_process(case, mixup, is_memory)
        found[side].append(numbers)
        return numbers["step_seconds"]

    rounds = 1 if quick else MEMORY_ROUNDS if is_memory else ROUNDS
    sides: dict[str, Run] = {side: partial(take, side) for side in found}
    return compare(f"{case}, first step", sides, PLAIN, rounds, warmup=False), found


def _in_a_process(case: str, mixup: bool, is_memory: bool, quick: bool = False) -> dict[str, Any]:
    # else glibc keeps what is freed for what is asked for later, and how much of that fits differs from run to run
    setting = ["env", f"MALLOC_MMAP_THRESHOLD_={MAPPED_BYTES}"] * is_memory
    options = ["--mixup"] * mixup + ["--quick"] * quick
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*setting, sys.executable, "-m", "bench.look", case, "numbers.json", *options]
        Running(arguments, folder, path=(Path(__file__).parent.parent,)).wait()
        numbers: dict[str, Any] = json.loads(Path(folder, "numbers.json").read_text())
    return numbers


def _look_row(case: str, found: Found, quick: bool) -> dict[str, Any]:
    layers = found[MIXED][0]["layers"]
    look, forward = _beyond_plain(found, "step_seconds"), [one["forward_seconds"] for one in found[PLAIN]]
    return {
        "case": f"{case}, {len(layers)} layers",
        "against": "forward pass",
        "layers": layers,
        "seconds": {"forward pass": forward, "look": look},
        "median_seconds": {"forward pass": statistics.median(forward), "look": statistics.median(look)},
        "ratios": {"look": ratio(look, forward)},
        "targets": {} if quick else {"look": float(len(layers) + SPARE_PASSES)},
    }


def _peak_row(case: str, found: Found, quick: bool) -> dict[str, Any]:
    """A row that has no seconds, so that tables of times leave it out: its bytes are those of :func:`_memory`."""
    extra, sizes = _beyond_plain(found, "peak_bytes"), found[MIXED][0]
    return {
        "case": case,
        "against": "buffers and outputs",
        "seconds": {},
        "median_seconds": {},
        "ratios": {"extra memory": ratio(extra, [sizes["buffers_bytes"] + sizes["outputs_bytes"]] * len(extra))},
        "targets": {} if quick else {"extra memory": 1.0},
    }


def _memory(case: str, found: Found) -> dict[str, Any]:
    sizes = found[MIXED][0]
    return {
        "case": case,
        "no_mixup_bytes": statistics.median(one["peak_bytes"] for one in found[PLAIN]),
        "with_callback_bytes": statistics.median(one["peak_bytes"] for one in found[MIXED]),
        "extra_bytes": statistics.median(_beyond_plain(found, "peak_bytes")),
        "buffers_bytes": sizes["buffers_bytes"],
        "outputs_bytes": sizes["outputs_bytes"],
    }


def _beyond_plain(found: Found, key: str) -> list[float]:
    """What the callback's side has beyond the plain one in each round."""
    return [float(ours[key] - other[key]) for ours, other in zip(found[MIXED], found[PLAIN], strict=True)]


def main() -> None:
    """Take one first step in this process and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("file", type=Path, help="for the numbers")
    parser.add_argument("--mixup", action="store_true", help="with ManifoldMixupCallback")
    parser.add_argument("--quick", action="store_true", help="of a small network")
    arguments = parser.parse_args()
    arguments.file.write_text(json.dumps(first_step(arguments.case, arguments.mixup, arguments.quick)))


if __name__ == "__main__":
    main()
