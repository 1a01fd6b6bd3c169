"""Memory that mixing a hidden state needs: what autograd keeps for the backward pass, and the peaks of both passes."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from bench.interpolation import Way, ways
from mm_lightning.mixup import BetaRatio, MixPlan, PlanSource

__all__ = ["kept_bytes", "measure", "peak_bytes"]

SHAPE, QUICK_SHAPE = (100, 64, 32, 32), (100, 8, 16, 16)


def measure(quick: bool) -> dict[str, Any]:
    """Count the bytes of each way to mix, with one ``lam`` for the batch and with one for each row."""
    hidden = torch.randn(QUICK_SHAPE if quick else SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    gc.collect()  # what went later would count as freed by a call
    for per_sample in (False, True):
        plan = PlanSource(["input"], ratio=BetaRatio(2.0, per_sample)).draw(len(hidden))
        case = f"{hidden.nbytes / 1e6:.3g} MB, float32, {'lam per sample' if per_sample else 'one lam'}"
        found += [{"case": case, "way": name, **_bytes_of(way, hidden, plan)} for name, way in ways().items()]
    notes = [
        "Kept: what autograd saves for the backward pass, the hidden state itself left out.",
        "Peaks: the most bytes that are allocated at a time, beyond the hidden state and the incoming gradient. The "
        "result is one of the hidden states that they hold.",
    ]
    return {"rows": [], "memory": found, "notes": notes}


def kept_bytes(call: Callable[[], object], given: Tensor) -> int:
    """Bytes of the tensors that autograd saves in a call, each piece of memory counted once, without ``given``'s."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # alive until the end, so that no address is counted for two
    kept.pop(given.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call has allocated at a time on the CPU, by the profiler's record of the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    sizes = [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]
    return max(accumulate(sizes, initial=0))


def _bytes_of(way: Way, hidden: Tensor, plan: MixPlan) -> dict[str, int]:
    mixed = way(hidden, plan)
    gradient = torch.randn_like(mixed)
    return {
        "kept_bytes": kept_bytes(lambda: way(hidden, plan), hidden),
        "peak_forward_bytes": peak_bytes(lambda: way(hidden, plan)),
        "peak_backward_bytes": peak_bytes(lambda: torch.autograd.grad(mixed, hidden, gradient)),
        "hidden_bytes": hidden.nbytes,
    }
