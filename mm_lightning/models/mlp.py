"""Multilayer perceptrons as lists of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from torch import nn

from mm_lightning.arguments import check_number, plain, refusal

__all__ = ["mlp_blocks"]


def mlp_blocks(
    sizes: Sequence[int | None],
    mix_before: Iterable[int] = (),
    negative_slope: float = 0.3,  # this one and the next are set in conf/ alone
    dropout: Sequence[float] | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> list[tuple[nn.Module, bool]]:
    """Build the blocks of a multilayer perceptron for a MixableModule.

    Every block is a linear layer and, but for the last, a LeakyReLU and, where asked for, dropout; the first one
    flattens its input. Weights are Glorot-uniform and biases zero.

    Args:
        sizes: Units of each layer, from the flattened input to the logits: L + 1 numbers for L blocks. The first may be
            None, if ``input_shape`` is given, and the last, if ``num_classes`` is.
        mix_before: Indices in 0 ... L - 1 of the blocks that the batch may be mixed before; 0 is the input.
        negative_slope: Slope of the LeakyReLU below zero.
        dropout: Share of the units dropped after each of the L - 1 hidden layers, in [0, 1); None drops none.
        input_shape: Shape of one input; None does not check the first size.
        num_classes: Number of classes; None does not check the last size.

    Returns:
        ``(block, eligible)`` for each block. Block i maps (N, sizes[i]) to (N, sizes[i + 1]), the first one (N, ...).

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If there are fewer than two sizes, the first or the last is not that of the data, ``mix_before``
            names a block that is not there, or ``dropout`` is not one share for each hidden layer.
    """
    units = _completed(_listed("sizes", sizes, "numbers of units"), input_shape, num_classes)
    last = len(units) - 2
    eligible = _listed("mix_before", mix_before, "numbers of blocks")
    if unknown := [block for block in eligible if block not in range(last + 1)]:
        raise ValueError(f"mix_before names the blocks {unknown}, but the blocks are 0 to {last}. Name some of them.")
    check_number("negative_slope", negative_slope, "a finite number", math.isfinite, "0.3 is the default.")
    shares = [0.0] * last if dropout is None else _listed("dropout", dropout, "shares")
    if len(shares) != last or not all(_is_share(share) for share in shares):
        text = f"dropout must be {last} numbers in [0, 1), one for each hidden layer, got {shares}"
        raise ValueError(f"{text}. None drops nothing.")
    blocks: list[tuple[nn.Module, bool]] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(units)):
        modules: list[nn.Module] = [nn.Flatten()] if i == 0 else []
        modules.append(_linear(fan_in, fan_out))
        if i < last:
            modules.append(nn.LeakyReLU(negative_slope))
            if shares[i]:
                modules.append(nn.Dropout(shares[i]))
        blocks.append((nn.Sequential(*modules), i in eligible))
    return blocks


def _completed(sizes: list[int | None], input_shape: Sequence[int] | None, num_classes: int | None) -> list[int]:
    """The sizes with the ends that the data tell."""
    expected = "sizes must hold at least two integers >= 1"
    if len(sizes) < 2:
        raise ValueError(f"{expected}, got {sizes}. [784, 256, 10] are two blocks.")
    of_data = None if input_shape is None else math.prod(_listed("input_shape", input_shape, "sizes"))
    if input_shape is not None and sizes[0] not in (None, of_data):
        what = f"an input of the data has {of_data} numbers (shape {tuple(input_shape)})"
        raise ValueError(f"sizes begin with {sizes[0]}, but {what}. Begin with {of_data}, or null to read it there.")
    if num_classes is not None and sizes[-1] not in (None, num_classes):
        what = f"the data have {num_classes} classes"
        raise ValueError(f"sizes end with {sizes[-1]}, but {what}. End with {num_classes}, or null to read it there.")
    ends = {0: of_data, len(sizes) - 1: num_classes}
    units = [ends.get(place) if size is None else size for place, size in enumerate(sizes)]
    known = [
        int(size) for size in units if isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1
    ]
    if len(known) < len(units):
        raise ValueError(f"{expected}, got {units}. Null is read from data that have input_shape and num_classes.")
    return known


def _listed(name: str, values: Any, of: str) -> list[Any]:
    given = plain(values)
    if not isinstance(given, list):
        raise refusal(name, given, f"a list of {of}", "One is written [1].")
    return given


def _is_share(share: Any) -> bool:
    return isinstance(share, Real) and not isinstance(share, bool) and 0 <= float(share) < 1


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
