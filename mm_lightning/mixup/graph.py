"""Where may a batch be mixed? Where every path from the batch to the loss runs through: the dominators of the graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import Tensor
from torch.autograd.graph import Node

from mm_lightning.mixup.trace import Call, Trace

__all__ = ["Place", "find_places", "find_sources"]

_BATCH, _LOSS = "the batch", "the loss"


@dataclass(frozen=True, eq=False)
class Place:
    """A module as a place to mix at.

    Attributes:
        name: Dotted name of the module.
        shape: Shape of its output, of the first if there are several; None if it did not run.
        verdict: ``"safe"`` if every path from the batch to the loss runs through its output, ``"bypassed"`` if a path
            leads around it, ``"unusable"`` if it cannot be mixed at all, ``"unknown"`` if the graph does not tell.
        reason: Why it is not safe; empty if it is.
        depth: Share of the network's weighted layers that the batch has passed at its end, in [0, 1].
        order: Position along the path from the batch to the loss.
        embeds: Entries at which integers of the batch become floating point numbers in this module: the input k = 0.
    """

    name: str
    shape: tuple[int, ...] | None
    verdict: str
    reason: str
    depth: float
    order: int
    embeds: tuple[Hashable, ...] = ()

    @property
    def is_safe(self) -> bool:
        """Whether the batch may be mixed here."""
        return self.verdict == "safe"


def find_places(
    trace: Trace,
    names: Iterable[str],
    batch_size: int,
    batch_dim: int | Mapping[str, int] = 0,
    describe: Callable[[str], bool] = lambda name: True,
) -> list[Place]:
    """Judge modules by one traced forward pass.

    Args:
        trace: The record.
        names: Names of the modules to judge.
        batch_size: Number of rows.
        batch_dim: Dimension of module outputs that holds the batch; or that of some modules, by name.
        describe: Whether to find a path around the module of this name, which takes as long as the network is deep.

    Returns:
        A place for each name, in their order.
    """
    graph = _Graph(trace)
    dims = batch_dim if isinstance(batch_dim, Mapping) else {}
    default = 0 if isinstance(batch_dim, Mapping) else batch_dim
    return [graph.judge(name, batch_size, dims.get(name, default), describe(name)) for name in names]


def find_sources(
    output: Tensor, mixed: Collection[Node], batch: Collection[Node], targets: Collection[Node] = ()
) -> tuple[bool, str | None]:
    """Walk back from ``output`` to where it comes from, not past the mix.

    A layer may be mixed if every path from the batch to the output runs through it. So the walk must meet the mix, and
    must meet nothing of the batch beside it.

    Args:
        output: A tensor with a graph, the logits.
        mixed: The nodes that made the mixed hidden states.
        batch: The nodes at which the batch's inputs enter the graph.
        targets: Nodes that look up targets, class centres for example.

    Returns:
        Whether the mix was met, and the name of a node of the batch that was met beside it, or None.
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
        if node in targets:
            continue
        if node in batch:
            around = "an embedding" if node.name().startswith("EmbeddingBackward") else "the input"
        waiting.extend(parent for parent, _ in node.next_functions)
    return meets_mix, around


class _Graph:
    """The computation from the batch's inputs to the losses, an edge for each step."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.entries: dict[Hashable, list[Hashable]] = {}
        for entry in trace.entries:
            if entry.is_input and entry.is_value:
                self.entries.setdefault(entry.node, []).extend(entry.parents)
        upstream = nx.DiGraph()
        upstream.add_node(_LOSS)
        waiting: list[Hashable] = [_LOSS]
        while waiting:
            node = waiting.pop()
            for parent in self._parents(node):
                if parent not in upstream:
                    waiting.append(parent)
                upstream.add_edge(parent, node)
        sources = [leaf for leaf in trace.leaves if leaf in upstream]
        upstream.add_edges_from((_BATCH, leaf) for leaf in sources)
        self.upstream = upstream
        self.is_connected = _BATCH in upstream
        below = nx.descendants(upstream, _BATCH) | {_BATCH} if self.is_connected else set()
        self.graph = upstream.subgraph(below).copy()  # a view would be slow to walk
        self.order = {node: i for i, node in enumerate(nx.topological_sort(self.graph))}
        self.dominators = self._dominators()
        self.places = {node: i for i, node in enumerate(self.dominators)}
        targets = [entry.node for entry in trace.entries if not entry.is_input and entry.node in self.graph]
        self.after_targets = set(targets)
        while targets:
            after = set(self.graph.successors(targets.pop())) - self.after_targets
            self.after_targets |= after
            targets += after
        self.weighted = [
            node
            for call in trace.calls.values()
            if call.has_weights and (node := next((n for n in call.nodes if n in self.graph), None)) is not None
        ]
        self.names = {
            node: name for name, call in reversed(trace.calls.items()) for node in call.nodes if node is not None
        }

    def judge(self, name: str, batch_size: int, batch_dim: int, describe: bool) -> Place:
        call = self.trace.calls.get(name)
        mixable = [] if call is None else _mixable(call, batch_size, batch_dim)
        inside = [node for node in mixable if node in self.graph]
        verdict, reason = self._verdict(call, mixable, batch_size, batch_dim, describe)
        return Place(
            name,
            call.shapes[0] if call is not None and call.shapes else None,
            verdict,
            reason,
            max(map(self._depth, inside), default=0.0),
            max((self.places.get(node, -1) for node in inside), default=-1),
            tuple(node for parent in inside for node in self.graph.predecessors(parent) if self._embeds(node)),
        )

    def _parents(self, node: Hashable) -> list[Hashable]:
        if node == _LOSS:
            return [*self.trace.losses]
        if isinstance(node, Node):
            return [parent for parent, _ in node.next_functions if parent is not None] + self.entries.get(node, [])
        return list(self.trace.parents.get(node, ()))

    def _dominators(self) -> list[Hashable]:
        """What every path from the batch to the loss runs through, in this order."""
        if not self.is_connected:
            return []
        immediate = nx.immediate_dominators(self.graph, _BATCH)
        chain: list[Hashable] = [_LOSS]
        while chain[-1] != _BATCH:
            chain.append(immediate[chain[-1]])
        return chain[::-1]

    def _verdict(
        self, call: Call | None, mixable: list[Hashable | None], batch_size: int, batch_dim: int, describe: bool
    ) -> tuple[str, str]:
        if call is None:
            return "unusable", "does not run in training_step"
        if call.count > 1:
            return "unusable", f"runs {call.count} times in training_step"
        if not mixable:
            shapes = ", ".join(str(shape) for shape in call.shapes) or "no tensor"
            return (
                "unusable",
                f"has no floating point output with the {batch_size} rows in dimension {batch_dim}: {shapes}",
            )
        inside = [node for node in mixable if node in self.graph]
        if not inside and any(node in self.upstream for node in mixable):
            return "unknown", "nothing of the batch passes through it"
        if not inside:
            return "unknown", "its output is not used, or no gradient passes it"
        if any(node in self.after_targets for node in inside):
            return "unusable", "computes the loss: its output depends on the targets"
        if len(inside) == 1 and inside[0] in self.places:
            return "safe", ""
        if len(inside) == 1 and not describe:
            return "bypassed", "a path leads around it"
        path = self._path_around(set(inside))
        return ("safe", "") if path is None else ("bypassed", path)

    def _path_around(self, nodes: set[Hashable]) -> str | None:
        """Describe a path from the batch to the loss beside ``nodes``; None if there is none."""
        came_from: dict[Hashable, Hashable] = {_BATCH: _BATCH}
        waiting = deque([_BATCH])
        while waiting and _LOSS not in came_from:
            node = waiting.popleft()
            for child in self.graph.successors(node):
                if child not in came_from and child not in nodes:
                    came_from[child] = node
                    waiting.append(child)
        if _LOSS not in came_from:
            return None
        path: list[Hashable] = [_LOSS]
        while path[-1] != _BATCH:
            path.append(came_from[path[-1]])
        # What the path shares with all paths says where it leaves and comes back; the rest is the way around.
        path = path[::-1]
        chain = set(self.dominators)
        ancestors = set().union(*(nx.ancestors(self.graph, node) for node in nodes))
        shared = [node for node in path if node in chain and (node in self.names or node in (_BATCH, _LOSS))]
        before = next((node for node in reversed(shared) if node in ancestors), _BATCH)
        after = next((node for node in shared if node not in ancestors), _LOSS)
        between = path[path.index(before) + 1 : path.index(after)]
        beside = [self.names[node] for node in between if node in self.names]
        through = f" through {beside[0]!r}" if beside else ""
        return f"a path from {self._called(before)} to {self._called(after)}{through} leads around it"

    def _called(self, node: Hashable) -> str:
        return str(node) if node in (_BATCH, _LOSS) else repr(self.names[node])

    def _depth(self, node: Hashable) -> float:
        # Of a node that everything runs through, what comes before it in any order of the graph is its past.
        if not self.weighted:
            return 0.0
        return sum(self.order[weighted] <= self.order[node] for weighted in self.weighted) / len(self.weighted)

    def _embeds(self, node: Hashable) -> bool:
        entered = self.entries.get(node, [])
        return bool(entered) and all(
            self.trace.is_integer[index] for parent in entered for index in self.trace.origins[parent]
        )


def _mixable(call: Call, batch_size: int, batch_dim: int) -> list[Hashable | None]:
    """Nodes of the output tensors that can be mixed."""
    return [
        node
        for node, shape, dtype in zip(call.nodes, call.shapes, call.dtypes, strict=True)
        if len(shape) > batch_dim and shape[batch_dim] == batch_size and dtype.is_floating_point
    ]
