"""What inputs may be: their bounds, and the unit in which changes of them are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["InputBounds", "bounds_of_images", "bounds_of_rows"]


class InputBounds(NamedTuple):
    """Bounds and units of inputs, by channel or feature: each broadcasts over a batch of inputs.

    Attributes:
        low: Smallest value of an input.
        high: Largest value.
        unit: What one unit of a change, of an epsilon say, is in the inputs.
        std: Standard deviation of training inputs.
        words: What the unit is.
    """

    low: Tensor
    high: Tensor
    unit: Tensor
    std: Tensor
    words: str

    def to(self, inputs: Tensor) -> InputBounds:
        """Return them in the dtype and on the device of ``inputs``."""
        low, high, unit, std = (one.to(inputs) for one in (self.low, self.high, self.unit, self.std))
        return InputBounds(low, high, unit, std, self.words)

    def clip(self, inputs: Tensor, origin: Tensor) -> Tensor:
        """Bring ``inputs`` within the bounds; where ``origin`` lies outside, no further outside than that."""
        return inputs.clamp(torch.minimum(self.low, origin), torch.maximum(self.high, origin))


def bounds_of_images(mean: Sequence[float], std: Sequence[float]) -> InputBounds:
    """Return the bounds of images in [0, 1] of which a mean was subtracted, and which were divided by a deviation.

    The unit is that of the pixels before: an epsilon of 8/255 moves each pixel by up to 8 of 255 levels.

    Args:
        mean: Of each channel; 0 if none was subtracted.
        std: By which each channel was divided; 1 if by none.

    Example:
        >>> bounds_of_images([0.5], [0.25]).low
        tensor([[[-2.]]])
    """
    centre, deviation = (torch.tensor(list(each), dtype=torch.float64).float()[:, None, None] for each in (mean, std))
    unit = 1 / deviation
    return InputBounds(-centre * unit, (1 - centre) * unit, unit, torch.ones_like(unit), "pixels in [0, 1]")


def bounds_of_rows(inputs: Tensor) -> InputBounds:
    """Return the bounds that training inputs show: their smallest and largest values, and as a unit the range between.

    By channel for images (N, C, H, W), by feature for (N, D), and over all values for any other shape. A feature that
    does not vary cannot be changed. Images that were normalised from all of [0, 1] get the unit of their pixels.

    Args:
        inputs: Of training, (N, ...).
    """
    per = {4: ("channel", (0, 2, 3)), 2: ("feature", (0,))}
    what, dims = per.get(inputs.ndim, ("input", tuple(range(inputs.ndim))))
    low, high = inputs.amin(dim=dims, keepdim=True)[0], inputs.amax(dim=dims, keepdim=True)[0]
    std = inputs.std(dim=dims, keepdim=True, correction=0)[0]
    return InputBounds(low, high, high - low, std, f"the range of the training data, by {what}")
