"""What a run shows of one layer: is there a way around it, what must move along, what can be replayed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import cached_property

from torch import nn
from torchmetrics import Metric, MetricCollection

from mm_lightning.look.graph import Graph
from mm_lightning.look.nodes import Call, Inside, Leaf, Node, Result, closure
from mm_lightning.step.replay import TakenOver

__all__ = ["Calls", "Ways"]

Calls = tuple[tuple[nn.Module, TakenOver], ...]


class Ways:
    """The ways from the batch to the loss, seen from a layer.

    Args:
        graph: The run.
        layer: Calls of the layer, or what :class:`Entries` has of the input.
    """

    def __init__(self, graph: Graph, layer: Iterable[Node]) -> None:
        self.graph = graph
        self.layer = set(layer)
        self.below = graph.below(self.layer)

    @property
    def after(self) -> set[Node]:
        """The layer, and what comes from it."""
        return self.layer | self.below

    @cached_property
    def targets(self) -> set[Leaf]:
        """Tensors of the batch that the loss sees past the layer and the weights after it: they must move along."""
        after = {node for node in self.graph.weights if node in self.below}
        reached = closure([self.graph.loss], avoiding=self.layer | after)
        return {node for node in reached if isinstance(node, Leaf)}

    @cached_property
    def meets_masks(self) -> bool:
        """Whether masks of the batch meet what comes from the layer."""
        masks = [leaf for leaf in self.graph.flow.leaves if leaf not in self.targets and leaf not in self.layer]
        return bool(self.graph.below(masks, avoiding=self.layer) & self.below)

    def path_around(self) -> str:
        """Describe a way past the layer that has weights on it, or leads into weights after it; empty if none."""
        loss = self.graph.loss
        upstream = closure([loss], avoiding=self.layer, by_values=True)
        from_batch = self.graph.below(self.graph.flow.leaves, avoiding=self.layer, by_values=True)
        for weights in self.graph.weights:
            if weights in upstream and weights in from_batch and (weights in self.below or weights.is_trained):
                return self._described([*self._way_to_batch(weights), *self._way_to_loss(weights)])
        return ""

    def _way_to_batch(self, start: Node) -> list[Node]:
        return _way(start, lambda n: [p for p, v in n.parents.items() if v and p not in self.layer], _is_leaf)[::-1]

    def _way_to_loss(self, start: Node) -> list[Node]:
        children = self.graph.children
        onward = lambda n: [c for c in children.get(n, ()) if c.parents[n] and c not in self.layer]  # noqa: E731
        return _way(start, onward, lambda node: node is self.graph.loss)

    def _described(self, way: list[Node]) -> str:
        before_layer = closure(self.layer)
        results = [node for node in way if isinstance(node, Result) and node.call.name]
        before = next((result for result in reversed(results) if result in before_layer), None)
        results = results[results.index(before) + 1 :] if before is not None else results
        after = next((result for result in results if result in self.below), None)
        beside = [result for result in results if result not in self.below]
        through = f" through {beside[0].call.name!r}" if beside else ""
        start = "the batch" if before is None else repr(before.call.name)
        end = "the loss" if after is None else repr(after.call.name)
        return f"a path from {start} to {end}{through} leads around it"

    def replayed(self) -> tuple[Calls, list[nn.Module]]:
        """Which calls the partners' half takes over, and the modules that run in it.

        Of what comes after the layer, the network is taken over: what is not reached by targets on a way around the
        layer. Of all else, what the loss does not need is taken over as well, for nobody looks at it.
        """
        hooks = [hook for hook in self.graph.flow.hooks if hook in self.below]  # which may look at targets
        tainted = self.graph.below([*self.targets, *hooks], avoiding=self.layer) | self.targets
        after = {node for node in self.graph.weights if node in self.below}
        before_weights = closure(after)

        def is_network(call: Call) -> bool:
            if not self.below.intersection(call.results) or tainted.intersection(call.results):
                return False
            has_parameters = next(call.module.parameters(), None) is not None
            return has_parameters or bool(before_weights.intersection(call.results))

        runs: set[Call] = set()
        mixed: set[Call] = set()
        seen: set[Node] = set()
        waiting: list[Node] = [self.graph.loss]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            call = node.call if isinstance(node, (Inside, Result)) else None
            if node in self.layer or (isinstance(node, Result) and is_network(node.call)):
                runs.update(call.around if call is not None else ())
                mixed.update((call,) if call is not None else ())
                continue
            if call is not None:
                runs.update((call, *call.around))
            waiting.extend(node.parents)
        entries = {node.call for node in self.layer if isinstance(node, Result)}  # which take a target, inside too
        for call in self.graph.flow.calls:  # a loss that is only logged is interpolated, too; a metric sees own targets
            is_metric = isinstance(call.module, (Metric, MetricCollection))
            is_inner = any(around in mixed or around in entries for around in call.around)
            if not tainted.isdisjoint(call.results) and not is_metric and not is_inner:
                runs.update((call, *call.around))
        taken: set[Call] = set()
        for call in self.graph.flow.calls:  # those around come first
            if call not in runs and not any(around in taken for around in call.around):
                taken.add(call)
        return self._taken_over(taken, mixed), list({id(call.module): call.module for call in _in_turn(runs)}.values())

    def only_the_layer(self) -> Calls:
        """Take over the layer alone: right whenever anything is, and dear."""
        calls = {node.call for node in self.layer if isinstance(node, Result)}
        return self._taken_over(calls, calls)

    def _taken_over(self, taken: set[Call], mixed: set[Call]) -> Calls:
        calls = []
        for module in {id(call.module): call.module for call in _in_turn(taken)}.values():
            runs = self.graph.runs_of(module)
            numbers = None if all(run in taken for run in runs) else frozenset(r.number for r in runs if r in taken)
            is_mixed = all(run in mixed for run in runs)
            changed, hooked = any(run.is_changed for run in runs), any(run.is_hooked for run in runs)
            calls.append((module, TakenOver(is_mixed, numbers, changed, hooked)))
        return tuple(calls)


def _in_turn(calls: set[Call]) -> list[Call]:
    return sorted(calls, key=lambda call: call.begin)


def _way(start: Node, onward: Callable[[Node], list[Node]], is_end: Callable[[Node], bool]) -> list[Node]:
    """A shortest way from one node to another."""
    came_from: dict[Node, Node | None] = {start: None}
    waiting = deque([start])
    while waiting:
        node: Node | None = waiting.popleft()
        assert node is not None
        if is_end(node):
            way = []
            while node is not None:
                way.append(node)
                node = came_from[node]
            return way[::-1]
        for other in onward(node):
            if other not in came_from:
                came_from[other] = node
                waiting.append(other)
    return []


def _is_leaf(node: Node) -> bool:
    return isinstance(node, Leaf)
