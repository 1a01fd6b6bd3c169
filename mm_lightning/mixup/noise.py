"""Random numbers of a plan: a function of its seed and the kind of device, eager or compiled; no global state moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["normal", "uniform"]

_MODULUS = 2**63


def uniform(seed: Tensor, shape: Sequence[int], device: torch.device, stream: int = 0) -> Tensor:
    """Draw numbers evenly from [0, 1).

    Args:
        seed: int64 scalar on the CPU, >= 0.
        shape: Shape of what is returned.
        device: Its device.
        stream: Another number gives other draws of the same seed.

    Returns:
        float32.
    """
    return _draw(seed, list(shape), device, stream, False)


def normal(seed: Tensor, shape: Sequence[int], device: torch.device, stream: int = 0) -> Tensor:
    """Draw numbers from the standard normal distribution, as :func:`uniform`."""
    return _draw(seed, list(shape), device, stream, True)


def _draw(seed: Tensor, shape: list[int], device: torch.device, stream: int, is_normal: bool) -> Tensor:
    if torch.compiler.is_compiling():  # a generator would break the graph, and a number be a constant of it
        drawn: Tensor = torch.ops.mm_lightning.draw(seed, shape, device, stream, is_normal)
        return drawn
    return _drawn(seed, shape, device, stream, is_normal)


def _drawn(seed: Tensor, shape: Sequence[int], device: torch.device, stream: int, is_normal: bool) -> Tensor:
    generator = torch.Generator(device).manual_seed((int(seed) + stream * 0x9E3779B97F4A7C15) % _MODULUS)
    make = torch.randn if is_normal else torch.rand
    return make(shape, generator=generator, device=device, dtype=torch.float32)


# Not torch.library.custom_op, which imports the compiler.
_LIBRARY = torch.library.Library("mm_lightning", "FRAGMENT")
_LIBRARY.define("draw(Tensor seed, SymInt[] shape, Device device, int stream, bool is_normal) -> Tensor")
_LIBRARY.impl("draw", _drawn, "CompositeExplicitAutograd")


@torch.library.register_fake("mm_lightning::draw", lib=_LIBRARY)
def _(seed: Tensor, shape: Sequence[int], device: torch.device, stream: int, is_normal: bool) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.float32)
