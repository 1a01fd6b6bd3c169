"""One run as a graph: what comes from what, and where the batch enters the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from mm_lightning.look.flow import Flow
from mm_lightning.look.nodes import Call, Leaf, Node, Weights, closure

__all__ = ["Entries", "Graph"]


@dataclass(frozen=True, eq=False)
class Entries:
    """Where the batch enters the network: the layer ``"input"``.

    Attributes:
        leaves: Tensors of the batch that are inputs and nothing else: they are mixed themselves.
        calls: Calls that take a tensor which is a target too: it is mixed where it enters them, with all that does.
        embeddings: Calls at whose output integers of the batch have become numbers.
        problem: Why the input cannot be mixed; empty if it can.
    """

    leaves: tuple[Leaf, ...] = ()
    calls: tuple[Call, ...] = ()
    embeddings: tuple[Call, ...] = ()
    problem: str = ""

    @property
    def nodes(self) -> set[Node]:
        """All of them."""
        return {*self.leaves, *(result for call in (*self.calls, *self.embeddings) for result in call.results)}


class Graph:
    """One run as a graph.

    Args:
        flow: The record of the run.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.loss = Node({node: value for loss in flow.losses for node, value in loss.items()})
        self.nodes = closure([self.loss, *(result for call in flow.calls for result in call.results)])
        self.children: dict[Node, list[Node]] = {}
        for node in _in_order(self.nodes):
            for parent in node.parents:
                self.children.setdefault(parent, []).append(node)
        self.upstream = closure([self.loss])
        self.all_weights = [node for node in _in_order(self.upstream) if isinstance(node, Weights)]
        self.weights = [node for node in self.all_weights if not node.is_lookup]
        self._runs: dict[int, list[Call]] = {}  # by identity: a metric's hash changes with its state
        for call in flow.calls:
            self._runs.setdefault(id(call.module), []).append(call)

    def runs_of(self, module: nn.Module) -> list[Call]:
        """The calls of a module, in order."""
        return self._runs.get(id(module), [])

    def below(self, nodes: Iterable[Node], avoiding: Iterable[Node] = (), by_values: bool = False) -> set[Node]:
        """What comes from the nodes; they themselves do not count."""
        avoided = set(avoiding)
        seen: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            for child in self.children.get(node, ()):
                if child not in seen and child not in avoided and (not by_values or child.parents[node]):
                    seen.add(child)
                    waiting.append(child)
        return seen

    @cached_property
    def targets(self) -> set[Leaf]:
        """Tensors of the batch that reach the loss past all weights."""
        return {n for n in closure([self.loss], avoiding=set(self.weights)) if isinstance(n, Leaf)}

    def has_weights(self, call: Call) -> bool:
        """Whether it applies weights of its own to what comes from the batch."""
        return any(node.within is call for node in self.weights)

    @cached_property
    def _weighted(self) -> list[Call]:
        last = {id(node.within.module): node.within for node in self.weights if node.within is not None}
        return list(last.values())

    def depth(self, call: Call) -> float:
        """Share of the weighted layers that have run when a call ends, in [0, 1]."""
        return sum(other.end <= call.end for other in self._weighted) / max(len(self._weighted), 1)

    def entries(self, has_rows: Callable[[Leaf], bool]) -> Entries:
        """Find out where the batch enters the network."""
        inputs = closure(self.weights, by_values=True)
        leaves = [leaf for leaf in self.flow.leaves if leaf in inputs and _is_number(leaf) and has_rows(leaf)]
        if not self.weights:  # nothing with weights was seen: what is no target is taken for the input
            leaves = [leaf for leaf in self.flow.leaves if _is_number(leaf) and leaf not in self.targets]
        embeddings, problem = self._embeddings()
        calls: list[Call] = []
        for leaf in leaves:
            if leaf in self.targets:
                found = [call for call in self.flow.calls if self._takes_in(call, leaf) and call.within not in calls]
                found = [call for call in found if not any(around in found for around in call.around)]
                calls += [call for call in found if call not in calls]
                if not found:
                    problem = "the input is a target too, and enters the network outside of any module"
        entered = closure(result for call in calls for result in call.results)
        for leaf in leaves if calls else ():
            if leaf in entered and self._gets_past(leaf, calls):
                names = " and ".join(repr(call.name) for call in calls)
                problem = f"an input enters the network at {names}, which takes a target too, and on a path around"
        pure = tuple(leaf for leaf in leaves if leaf not in self.targets and leaf not in entered)
        if not (pure or calls or embeddings) and not problem:
            problem = "nothing of the batch reaches the loss through weights that are trained"
        return Entries(pure, tuple(calls), tuple(embeddings), problem)

    def _takes_in(self, call: Call, leaf: Leaf) -> bool:
        """Whether a call takes an input that is a target too into the network, and nothing else of the targets."""
        above = closure(call.results)
        others = {node for node in above if isinstance(node, Leaf)} & self.targets - {leaf}
        met = [node for node in self.all_weights if node in above]
        earlier = any(node.within is None or not _is_in(node.within, call) for node in met)  # padding has none
        return leaf in above and not others and not earlier and any(not node.is_lookup for node in met)

    def _gets_past(self, leaf: Leaf, calls: list[Call]) -> bool:
        """Whether an input meets weights on a way around calls that take it in."""
        below = self.below([leaf], avoiding={result for call in calls for result in call.results}, by_values=True)
        met = [node for node in self.weights if node in below]
        return any(node.within is None or not any(_is_in(node.within, call) for call in calls) for node in met)

    def _embeddings(self) -> tuple[list[Call], str]:
        """The outermost calls in which nothing but integers meets weights."""
        first = []
        for node in _in_order(closure(self.weights)):
            if isinstance(node, Weights):
                above = closure(node.parents, by_values=True)
                leaves = [leaf for leaf in above if isinstance(leaf, Leaf)]
                if leaves and not any(map(_is_number, leaves)) and not any(isinstance(n, Weights) for n in above):
                    first.append(node)
        calls: list[Call] = []
        for node in first:
            call = node.within
            if call is None or not call.name or not self._has_no_weights_but(first, call):
                return [], (
                    "integers of the batch enter the network outside of a module such as nn.Embedding at whose output "
                    "they could be mixed"
                )
            while call.within is not None and call.within.name and self._only_embeds(call.within, first):
                call = call.within
            if call not in calls:
                calls.append(call)
        for call in calls:
            if any(run not in calls for run in self.runs_of(call.module)):
                return [], f"{call.name!r} embeds something else than inputs too"
        return calls, ""

    def _only_embeds(self, call: Call, first: list[Weights]) -> bool:
        if any(isinstance(node, Leaf) and _is_number(node) for node in closure(call.results, by_values=True)):
            return False  # numbers of the batch are mixed themselves
        return self._has_no_weights_but(first, call) and any(dtype.is_floating_point for dtype in call.dtypes)

    def _has_no_weights_but(self, first: list[Weights], call: Call) -> bool:
        inside = [n for n in self.nodes if isinstance(n, Weights) and n.within is not None and _is_in(n.within, call)]
        return all(node in first or node.is_lookup for node in inside)


def _in_order(nodes: Iterable[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: node.number)


def _is_number(leaf: Leaf) -> bool:
    return leaf.tensor.is_floating_point() or leaf.tensor.is_complex()


def _is_in(call: Call, outer: Call) -> bool:
    return call is outer or outer in call.around
