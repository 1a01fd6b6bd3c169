"""Inputs worse than those of training, after Hendrycks & Dietterich (2019): noise, blur and low contrast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_lightning.arguments import check_integer
from mm_lightning.evaluation.bounds import InputBounds

__all__ = ["Blur", "Contrast", "Noise", "shifts_of_five_strengths"]

_LARGE = 64  # pixels of the shorter side, from which on images are taken for large
# The constants of make_cifar_c.py and make_imagenet_c.py of Hendrycks & Dietterich, for strengths 1 to 5.
_NOISE = {"small": (0.04, 0.06, 0.08, 0.09, 0.10), "large": (0.08, 0.12, 0.18, 0.26, 0.38)}  # pixels in [0, 1]
_BLUR = {"small": (0.4, 0.6, 0.7, 0.8, 1.0), "large": (1.0, 2.0, 3.0, 4.0, 6.0)}  # pixels
_CONTRAST = {"small": (0.75, 0.5, 0.4, 0.3, 0.15), "large": (0.4, 0.3, 0.2, 0.1, 0.05)}  # what is left of it
_NOISE_OF_ROWS = (0.1, 0.2, 0.3, 0.5, 1.0)  # standard deviations of the training inputs; chosen here
_TRUNCATE = 4.0  # standard deviations at which the kernel of the blur ends, as scipy's does


@dataclass(frozen=True)
class _Shift:
    strength: int

    def __post_init__(self) -> None:
        is_one, way_out = (lambda strength: 1 <= strength <= 5), "1 is the weakest."
        check_integer("strength", self.strength, "an integer in [1, 5]", is_one, way_out)

    @property
    def name(self) -> str:
        """In log keys."""
        return f"{type(self).__name__.lower()}_{self.strength}"


class Noise(_Shift):
    """Add Gaussian noise to each value of an input.

    Its standard deviation is 0.04, 0.06, 0.08, 0.09 or 0.1 of pixels in [0, 1] for images with a side below 64 pixels,
    0.08 to 0.38 for larger ones, and these are clipped; for inputs that are no images it is 0.1, 0.2, 0.3, 0.5 or 1
    standard deviation of the training inputs.

    Attributes:
        strength: 1 to 5.
    """

    def __call__(self, inputs: Tensor, bounds: InputBounds, rng: torch.Generator) -> Tensor:
        """Return the noisy inputs.

        Args:
            inputs: Floating point, (N, ...).
            bounds: Of the inputs.
            rng: Draws the noise, on the CPU.
        """
        bounds = bounds.to(inputs)
        noise = torch.randn(inputs.shape, generator=rng, dtype=torch.float32).to(inputs)
        if inputs.ndim != 4:
            return inputs + _NOISE_OF_ROWS[self.strength - 1] * bounds.std * noise
        return bounds.clip(inputs + _constant(_NOISE, inputs, self.strength) * bounds.unit * noise, inputs)


class Blur(_Shift):
    """Blur each image with a Gaussian; beyond its border it goes on as it ends there.

    Its standard deviation is 0.4, 0.6, 0.7, 0.8 or 1 pixel for images with a side below 64 pixels, 1 to 6 for larger
    ones.

    Attributes:
        strength: 1 to 5.
    """

    def __call__(self, images: Tensor, bounds: InputBounds, rng: torch.Generator | None = None) -> Tensor:
        """Return the blurred images, (N, C, H, W). Nothing is drawn, and blurred images stay within bounds."""
        sigma = _constant(_BLUR, images, self.strength)
        radius = int(_TRUNCATE * sigma + 0.5)
        places = torch.arange(-radius, radius + 1, dtype=torch.float64)
        kernel = (-places.square() / (2 * sigma**2)).exp()
        kernel = (kernel / kernel.sum()).to(images)
        n, c, h, w = images.shape
        padded = F.pad(images, [radius] * 4, mode="replicate").reshape(n * c, 1, h + 2 * radius, w + 2 * radius)
        return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None]).reshape(n, c, h, w)


class Contrast(_Shift):
    """Bring each channel of an image nearer to its mean: ``mean + c * (image - mean)``.

    c is 0.75, 0.5, 0.4, 0.3 or 0.15 for images with a side below 64 pixels, 0.4 to 0.05 for larger ones.

    Attributes:
        strength: 1 to 5.
    """

    def __call__(self, images: Tensor, bounds: InputBounds, rng: torch.Generator | None = None) -> Tensor:
        """Return the images, (N, C, H, W). Nothing is drawn, and they stay within bounds."""
        left = _constant(_CONTRAST, images, self.strength)
        mean = images.mean(dim=(2, 3), keepdim=True)
        return mean + left * (images - mean)


def shifts_of_five_strengths(are_images: bool) -> list[Noise | Blur | Contrast]:
    """Return all of them; for inputs that are no images noise alone."""
    strengths = range(1, 6)
    noise = map(Noise, strengths)
    return [*noise, *map(Blur, strengths), *map(Contrast, strengths)] if are_images else [*noise]


def _constant(table: Mapping[str, Sequence[float]], images: Tensor, strength: int) -> float:
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}. For other inputs there is Noise.")
    return table["small" if min(images.shape[-2:]) < _LARGE else "large"][strength - 1]
