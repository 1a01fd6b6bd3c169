"""Mixing a hidden state under autograd, against the memory traffic that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.timing import compare, ratio, seconds_of
from mm_lightning.fast_cpu import keep_freed_memory
from mm_lightning.mixup import BetaRatio, MixPlan, PlanSource, mix

__all__ = ["measure", "ways"]

Way = Callable[[Tensor, MixPlan], Tensor]

SHAPES = {  # of the hidden state, by its size in float32
    "1 MB": (256, 1024),
    "8 MB": (128, 16, 32, 32),
    "26 MB": (100, 64, 32, 32),
    "64 MB": (128, 128, 32, 32),
    "256 MB": (128, 512, 32, 32),
}
QUICK_SHAPES = {"0.1 MB": (32, 1024), "0.5 MB": (32, 4, 32, 32)}
CHANNELS_LAST = ("8 MB", "64 MB", "0.5 MB")
TARGETS = {"mix": 1.25}
TIMES_FASTER = -2.0  # textbook over mix, at least


def measure(quick: bool) -> dict[str, Any]:
    """Time forward and backward of mixing, and the forward pass alone."""
    kept = keep_freed_memory()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in QUICK_SHAPES if quick else SHAPES:
            rows += _both_passes(_hidden(size, dtype), quick)
            if size in CHANNELS_LAST:
                rows += _both_passes(_hidden(size, dtype).to(memory_format=torch.channels_last), quick)
    hidden = _hidden("0.5 MB" if quick else "26 MB", torch.float32)
    rows += _both_passes(hidden, quick, per_sample=True)
    rows.append(_forward_only(hidden, quick))
    notes = [
        "'copies' copies as many bytes as mixing moves, between as many tensors (the hidden state, its gradient, and a "
        "new one for each): forward mixing reads two and writes one hidden state, and backward the same.",
        "Freed memory is kept by the process (mm_lightning.fast_cpu.keep_freed_memory): otherwise the system's page "
        "faults are most of the time above 32 MB, on all sides alike."
        if kept
        else "Freed memory could not be kept by the process here, so page faults count above 32 MB.",
    ]
    return {"rows": rows, "notes": notes}


def ways() -> dict[str, Way]:
    """The ways to mix a hidden state (N, ...), by name."""
    return {"mix": mix, "textbook": _textbook, "lerp": _lerp}


def _hidden(size: str, dtype: torch.dtype) -> Tensor:
    shape = {**SHAPES, **QUICK_SHAPES}[size]
    if dtype == torch.bfloat16:  # as many bytes in twice the channels or columns
        shape = (shape[0], 2 * shape[1], *shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _both_passes(hidden: Tensor, quick: bool, per_sample: bool = False) -> list[dict[str, Any]]:
    hidden = hidden.detach().requires_grad_()
    gradient = torch.randn_like(hidden)  # keeps the memory format
    plan = PlanSource(["input"], ratio=BetaRatio(2.0, per_sample)).draw(len(hidden))
    sides = {"copies": seconds_of(lambda: _copies(hidden, gradient))}
    for name, way in ways().items():
        sides[name] = seconds_of(_step(way, hidden, gradient, plan))
    facts = _facts(hidden, per_sample)
    case = f"{_name(facts)}{', lam per sample' * per_sample}"
    row = compare(case, sides, "copies", _rounds(hidden, quick), targets=TARGETS, **facts)
    return [row, _against_ours(row)]


def _step(way: Way, hidden: Tensor, gradient: Tensor, plan: MixPlan) -> Callable[[], object]:
    return lambda: torch.autograd.grad(way(hidden, plan), hidden, gradient)


def _against_ours(row: dict[str, Any]) -> dict[str, Any]:
    """The same seconds once more: how many times as long the textbook formula takes."""
    names = ("mix", "textbook")
    return {
        **row,
        "case": f"{row['case']}: textbook over mix",
        "against": "mix",
        "seconds": {name: row["seconds"][name] for name in names},
        "median_seconds": {name: row["median_seconds"][name] for name in names},
        "ratios": {"textbook": ratio(row["seconds"]["textbook"], row["seconds"]["mix"])},
        "targets": {"textbook": TIMES_FASTER},
    }


def _forward_only(hidden: Tensor, quick: bool) -> dict[str, Any]:
    """Two mixes without autograd against three copies: one mix reads and writes as much as one and a half."""
    plan = PlanSource(["input"]).draw(len(hidden))

    def twice() -> None:
        mix(hidden, plan)
        mix(hidden, plan)

    sides = {"copies": seconds_of(lambda: _copies(hidden, hidden)), "mix": seconds_of(twice)}
    facts = _facts(hidden, per_sample=False)
    case = f"{_name(facts)}, two forward passes without autograd"
    return compare(case, sides, "copies", _rounds(hidden, quick), targets=TARGETS, forward_only=True, **facts)


def _facts(hidden: Tensor, per_sample: bool) -> dict[str, Any]:
    return {
        "bytes": hidden.nbytes,
        "dtype": str(hidden.dtype).removeprefix("torch."),
        "layout": "contiguous" if hidden.is_contiguous() else "channels-last",
        "per_sample": per_sample,
    }


def _name(facts: dict[str, Any]) -> str:
    return f"{facts['bytes'] / 1e6:.3g} MB, {facts['dtype']}, {facts['layout']}"


def _rounds(hidden: Tensor, quick: bool) -> int:
    return 2 if quick else 40 if hidden.nbytes < 16e6 else 20 if hidden.nbytes < 100e6 else 10


def _copies(hidden: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        first, second = hidden.clone(), gradient.clone()
        first.copy_(second)


def _textbook(hidden: Tensor, plan: MixPlan) -> Tensor:
    lam = _number_or_column(hidden, plan)
    return lam * hidden + (1 - lam) * hidden[plan.partner]


def _lerp(hidden: Tensor, plan: MixPlan) -> Tensor:
    return torch.lerp(hidden[plan.partner], hidden, _number_or_column(hidden, plan))


def _number_or_column(hidden: Tensor, plan: MixPlan) -> Any:
    if plan.lam.stride(0) == 0:
        return float(plan.lam[0])
    return plan.lam.to(hidden.dtype).view(-1, *[1] * (hidden.dim() - 1))  # (N,) -> (N, 1, ..., 1)
