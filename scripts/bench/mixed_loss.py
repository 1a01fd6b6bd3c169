"""The cross-entropy of a mixed batch, forward and backward, in four ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import compare, seconds_of
from mm_lightning.mixup import MixPlan, PlanSource, mixed_cross_entropy

__all__ = ["losses", "measure"]

Loss = Callable[[Tensor, Tensor, MixPlan], Tensor]

SHAPES = {  # of the logits, (N, K, ...)
    "128 rows, 10 classes": (128, 10),
    "128 rows, 1,000 classes": (128, 1_000),
    "128 rows, 50,000 classes": (128, 50_000),
    "segmentation, 8 x 21 classes x 128 x 128": (8, 21, 128, 128),
}
QUICK_SHAPES = {"16 rows, 10 classes": (16, 10), "segmentation, 2 x 5 classes x 8 x 8": (2, 5, 8, 8)}


def measure(quick: bool) -> dict[str, Any]:
    """Time the loss and its gradient for the logits."""
    shapes = QUICK_SHAPES if quick else SHAPES
    rows = [_row(case, shape, 3 if quick else 60) for case, shape in shapes.items()]
    return {"rows": rows, "notes": ["Targets are class indices; one-hot targets are made in every step from them."]}


def losses() -> dict[str, Loss]:
    """The ways to compute the loss of logits (N, K, ...) and class indices (N, ...), by name."""
    return {
        "plain cross-entropy": lambda logits, targets, plan: F.cross_entropy(logits, targets),
        "mixed_cross_entropy": mixed_cross_entropy,
        "two cross-entropies": _two,
        "one-hot": _one_hot,
    }


def _row(case: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    plan = PlanSource(["input"]).draw(shape[0])

    def step(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits, targets, plan), logits)

    sides = {name: seconds_of(step(loss)) for name, loss in losses().items()}
    return compare(case, sides, "plain cross-entropy", rounds, classes=shape[1], bytes=logits.nbytes)


def _two(logits: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
    lam = plan.lam[0].to(logits.dtype)
    return lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[plan.partner])


def _one_hot(logits: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
    lam = plan.lam[0].to(logits.dtype)
    soft = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).to(logits.dtype)  # (N, ...) -> (N, K, ...)
    return F.cross_entropy(logits, lam * soft + (1 - lam) * soft[plan.partner])
