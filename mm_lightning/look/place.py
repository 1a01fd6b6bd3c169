"""A module as a place to mix at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from mm_lightning.look.graph import Graph
from mm_lightning.look.nodes import Call
from mm_lightning.look.ways import Ways

__all__ = ["Place"]


class Place:
    """A module as a place to mix at, before it is proved. What it says is found out when it is asked.

    Args:
        name: Dotted name of the module.
        calls: Its calls in the run, in order.
        graph: The run.
        find_problem: Says why it cannot be mixed at all; empty if it may.

    Attributes:
        shape: Shape of its output, of the first if there are several; None if it did not run.
        order: When it ended; -1 if it did not run.
    """

    def __init__(
        self, name: str, calls: Sequence[Call], graph: Graph, find_problem: Callable[[str, Sequence[Call]], str]
    ) -> None:
        self.name = name
        self._calls, self._graph, self._find_problem = calls, graph, find_problem
        self.shape = next(iter(self._calls[-1].shapes), None) if self._calls else None
        self.order = self._calls[-1].end if self._calls else -1

    @cached_property
    def depth(self) -> float:
        """Share of the network's weighted layers that the batch has passed at its end, in [0, 1]."""
        return self._graph.depth(self._calls[-1]) if self._calls else 0.0

    @cached_property
    def problem(self) -> str:
        """Why it cannot be mixed at all; empty if it may."""
        return self._find_problem(self.name, self._calls)

    @cached_property
    def way_around(self) -> str:
        """The way that leads around it; empty if none was seen."""
        return Ways(self._graph, self._calls[-1].results).path_around() if self._calls else ""
