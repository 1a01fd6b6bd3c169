"""Whether logits see the batch through the mixed layer, and through nothing else: a walk over the autograd graph."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["find_sources"]


def find_sources(output: Tensor, mixed: Collection[Node], batch: Collection[Node]) -> tuple[bool, str | None]:
    """Walk back from ``output`` to where it comes from, not past the mix.

    A layer may be mixed if every path from the batch to the output runs through it. So the walk must meet the mix, and
    must meet nothing of the batch beside it.

    Args:
        output: A tensor with a graph, the logits.
        mixed: The nodes that made the mixed hidden states.
        batch: The nodes that the batch's floating point tensors came from.

    Returns:
        Whether the mix was met, and the name of a node of the batch that was met beside it, or None. An embedding
        counts as the batch: no gradient reaches the integers it looks up.
    """
    meets_mix, around = False, None
    seen: set[Node] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in mixed:
            meets_mix = True
            continue
        if node in batch or node.name().startswith("EmbeddingBackward"):
            around = "the input" if node in batch else "an embedding"
        waiting.extend(parent for parent, _ in node.next_functions)
    return meets_mix, around
