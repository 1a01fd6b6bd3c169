"""Overheard outputs taken for the logits of a classifier, or why they cannot be."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mm_lightning.diagnostics.hidden_states import HiddenStates
from mm_lightning.evaluation.rows import IGNORED, check_targets, class_logits
from mm_lightning.namespaces import LightningModule

__all__ = ["Classified", "classified"]


class Classified(NamedTuple):
    """Rows of a classifier, of all processes, on the CPU."""

    logits: Tensor  # (N, K)
    targets: Tensor  # class indices, int64, (N,)


def classified(
    states: HiddenStates, module: LightningModule, obstacle: str | None, probabilities: bool, gather: bool = True
) -> Classified | str:
    """Return the rows of all processes, in float64, or why they are none of a classifier, as the end of a sentence.

    To be called by every process.

    Args:
        states: What was overheard of one layer.
        module: The module.
        obstacle: Why rows of this process could not be kept.
        probabilities: Whether the layer gives probabilities, not logits.
        gather: Whether each process has rows of its own.
    """
    (layer,) = states.layers
    collected = states.collected(module, gather)
    if obstacle is not None or collected is None:
        return obstacle or "no rows were seen"
    outputs, targets = collected[0][layer], collected[1].long()
    if len(shape := states.row_shapes[layer]) > 1:
        return f"{layer!r} gives {shape} for a row, not a logit for each class"
    kept = targets != IGNORED
    outputs, targets = outputs[kept], targets[kept]
    if not len(targets):
        return f"all targets are {IGNORED}"
    if not outputs.isfinite().all():
        return f"{layer!r} has values that are not finite"
    try:
        logits = class_logits(outputs.double(), len(outputs), probabilities)
        check_targets(targets, logits.shape[1])
    except (TypeError, ValueError) as error:
        return str(error).rstrip(".")
    return Classified(logits, targets)
