"""What the flow of one run is made of: tensors of the batch, places of weights, calls of modules and their results."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from mm_lightning.look.reordering import RowSamples
from mm_lightning.mixup.batch import Path
from mm_lightning.mixup.masks import MaskSite

__all__ = ["Call", "Inside", "Leaf", "Node", "Result", "Weights", "closure", "merged"]


class Node:
    """Something that data come from.

    Attributes:
        number: Of all nodes, in the order in which they were made: a set of them has no order of its own.
        parents: What it comes from in turn, and whether values flow from there, rather than masks that select or scale.
    """

    _count = itertools.count()

    def __init__(self, parents: dict[Node, bool] | None = None) -> None:
        self.number = next(self._count)
        self.parents: dict[Node, bool] = parents or {}


class Leaf(Node):
    """A tensor of the batch.

    Attributes:
        tensor: The tensor.
        path: Where in the batch it is.
    """

    def __init__(self, tensor: Tensor, path: Path) -> None:
        super().__init__()
        self.tensor, self.path = tensor, path


class Weights(Node):
    """A place where weights of two or more dimensions are applied.

    Attributes:
        within: The innermost call around it.
        is_lookup: Whether integers look rows of the weights up, as embeddings do.
        is_trained: Whether one of the weights is trained.
    """

    def __init__(self, parents: dict[Node, bool], within: Call | None, is_lookup: bool, is_trained: bool) -> None:
        super().__init__(parents)
        self.within, self.is_lookup, self.is_trained = within, is_lookup, is_trained


class Result(Node):
    """A tensor that a call returned.

    Attributes:
        call: The call.
    """

    def __init__(self, call: Call, parents: dict[Node, bool]) -> None:
        super().__init__(parents)
        self.call = call


class Call:
    """A call of a module.

    Attributes:
        name: The module's name.
        module: The module.
        number: How often it had run before.
        within: The call around it.
        inner: The calls in it.
        begin: When it began, on a clock of calls.
        end: When it ended; 0 while it runs.
        results: Its output tensors, as far as they come from the batch.
        shapes: Of its output tensors.
        dtypes: Of its output tensors.
        masks: Arguments in which it took masks.
        inside: What was made in it and used outside without being its output, a buffer say.
        is_changed: Whether what it returned was changed in place later.
        is_hooked: Whether the gradient of what it returned was hooked.
        samples: Some rows of what it returned.
    """

    def __init__(self, name: str, module: nn.Module, number: int, within: Call | None, begin: int) -> None:
        self.name, self.module, self.number, self.within, self.begin = name, module, number, within, begin
        self.end = 0
        self.results: list[Result] = []
        self.inner: list[Call] = []
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.masks: list[MaskSite] = []
        self.inside: Inside | None = None
        self.is_changed = self.is_hooked = False
        self.samples: RowSamples | None = None

    @property
    def around(self) -> Iterator[Call]:
        """The calls around it, from the inside."""
        call = self.within
        while call is not None:
            yield call
            call = call.within


class Inside(Node):
    """What was made in a call and used after its end without being its output."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def closure(nodes: Iterable[Node], avoiding: Collection[Node] = (), by_values: bool = False) -> set[Node]:
    """The nodes and all that they come from.

    Args:
        nodes: Where to begin.
        avoiding: Nodes that are not entered.
        by_values: Follow values alone, not masks.
    """
    seen: set[Node] = set()
    waiting = [node for node in nodes if node not in avoiding]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(
                parent
                for parent, carries_values in node.parents.items()
                if parent not in avoiding and (carries_values or not by_values)
            )
    return seen


def merged(*labels: dict[Node, bool]) -> dict[Node, bool]:
    """The parents of what comes from all of these."""
    parents: dict[Node, bool] = {}
    for label in labels:
        for node, carries_values in label.items():
            parents[node] = parents.get(node, False) or carries_values
    return parents
