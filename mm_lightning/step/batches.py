"""The batches of a mixed step's two halves."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from mm_lightning.mixup import INPUT
from mm_lightning.mixup.batch import fresh, leaf_at, map_leaves, tensors_of
from mm_lightning.mixup.mixing import Mixing
from mm_lightning.step.effects import Contents
from mm_lightning.step.way import Way

__all__ = ["Batches"]


class Batches:
    """The batch of the own half, and that of the partners'."""

    def __init__(self, batch: Any, mixing: Mixing, way: Way) -> None:
        self._mixing, self._way = mixing, way
        self._mixed: dict[int, Tensor] = {}
        if mixing.plan.layer == INPUT:
            for path in way.inputs:
                if isinstance(tensor := leaf_at(batch, path), Tensor):
                    self._mixed[id(tensor)] = self._mix(tensor)
        self.own = map_leaves(lambda leaf: self._mixed.get(id(leaf), leaf), batch) if self._mixed else batch
        # The step may fill and empty its batch, and write into its tensors: the halves begin with the same.
        self._contents = None if type(batch) is tuple else Contents(self.own)
        written = [leaf_at(self.own, path) for path in way.written]
        self._values = {id(t): t.clone() for t in written if isinstance(t, Tensor)}

    def has_target(self, tensor: Tensor) -> bool:
        """Whether it is a tensor of the batch that may be a target, with its rows in dimension 0."""
        has_rows = self._way.layout.dim_of(tensor, self._mixing.plan.batch_size) == 0
        return has_rows and any(tensor is other for other in tensors_of(self.own))

    @cached_property
    def partners(self) -> Any:
        """Everything in the partners' order, but for what was mixed."""
        mixed = {id(tensor) for tensor in self._mixed.values()}
        partner = self._mixing.for_loss.partner
        return self._way.layout.permuted(self.begun(), partner, skip=lambda leaf: id(leaf) in mixed)

    def begun(self) -> Any:
        """The batch as it was when the step began, in containers and with tensors of its own."""
        if self._contents is None and not self._values:
            return self.own
        now = None if self._contents is None else Contents(self.own)
        if self._contents is not None:
            self._contents.restore()
        try:
            return fresh(map_leaves(lambda leaf: self._values.get(id(leaf), leaf), self.own))
        finally:
            if now is not None:
                now.restore()

    def _mix(self, tensor: Tensor) -> Tensor:
        rows = self._mixing.plan.batch_size
        dim = self._way.layout.dim_of(tensor, rows)
        if dim is None:
            raise ValueError(
                f"The input of shape {tuple(tensor.shape)} has no row for each of the {rows} rows of the batch, so it "
                "cannot be mixed."
            )
        return self._mixing.mix(tensor.movedim(dim, 0)).movedim(0, dim)
