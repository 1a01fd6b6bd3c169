"""Mixing the input where it enters the network, when it is a target too and must stay unmixed outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mm_lightning.mixup.batch import Layout
from mm_lightning.mixup.mixing import Mixing
from mm_lightning.mixup.trees import map_tensors
from mm_lightning.step.replay import called_by

__all__ = ["mixed_entries"]


@contextmanager
def mixed_entries(modules: Sequence[nn.Module], mixing: Mixing, layout: Layout) -> Iterator[None]:
    """Hand modules their floating point arguments with the rows mixed as planned.

    Args:
        modules: Where inputs enter the network.
        mixing: The batch's.
        layout: Where the rows are.
    """

    def mixed(tensor: Tensor) -> Tensor:
        dim = layout.dim_of(tensor, mixing.plan.batch_size)
        if dim is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return mixing.mix(tensor.movedim(dim, 0)).movedim(0, dim)

    def call_with_mixed(entry: _Entry, call: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_tensors(mixed, (args, kwargs))
        return call(*args, **kwargs)

    with called_by(call_with_mixed, [_Entry(module) for module in modules]):
        yield


@dataclass(frozen=True, eq=False)
class _Entry:
    module: nn.Module
