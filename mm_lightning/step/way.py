"""How a step is run that is mixed at a layer: what the look tells every step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mm_lightning.mixup.batch import Layout, Path
from mm_lightning.step.effects import Effects
from mm_lightning.step.replay import TakenOver

__all__ = ["Way"]


@dataclass(frozen=True, eq=False)
class Way:
    """How a step is run that is mixed at one layer, as the look found it.

    Attributes:
        calls: Calls of modules that the partners' half takes over.
        effects: What that half changes in the module.
        layout: Where the rows of the batch are.
        written: Tensors of the batch that the step writes into.
        inputs: For the layer ``"input"``, the tensors of the batch that are mixed.
        entries: And the modules that take a tensor which is a target too, and mix it where it enters them.
        calls_layer: Whether the partners' half calls the layer, rather than something around it that is replayed.
    """

    calls: tuple[tuple[nn.Module, TakenOver], ...]
    effects: Effects
    layout: Layout
    written: frozenset[Path] = frozenset()
    inputs: frozenset[Path] = frozenset()
    entries: tuple[nn.Module, ...] = ()
    calls_layer: bool = True
