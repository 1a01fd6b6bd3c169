"""A module in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its modules back into its own mode afterwards."""
    training = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, mode in training.items():
            one.training = mode
