"""Deformations of images that a network has not been trained on: rotated, sheared, zoomed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_lightning.arguments import check_number

__all__ = ["Rotation", "Shear", "Zoom", "affine", "paper_deformations"]


@dataclass(frozen=True)
class _ByAngle(ABC):
    degrees: float

    def __post_init__(self) -> None:
        check_number("degrees", self.degrees, "a number >= 0", lambda angle: angle >= 0, "0 changes nothing.")

    @property
    def name(self) -> str:
        """In log keys."""
        return f"{type(self).__name__.lower()}_{self.degrees:g}"

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return the images, as :func:`affine` makes them.

        Args:
            images: Floating point, (N, C, H, W).
            rng: Draws the angles, on the CPU.
        """
        draws = 2 * torch.rand(len(images), generator=rng, dtype=torch.float64) - 1
        return affine(images, self.matrices(math.radians(self.degrees) * draws))

    @staticmethod
    @abstractmethod
    def matrices(angles: Tensor) -> Tensor:
        """Return matrices for angles in radians, (N,) to (N, 2, 2)."""


class Rotation(_ByAngle):
    """Rotate each image about its centre by an angle of its own, drawn evenly from +-``degrees``.

    Attributes:
        degrees: Largest angle, >= 0. Verma et al. (2019) test with 20, 40, 60 and 80 (tables 4 and 9).
    """

    @staticmethod
    def matrices(angles: Tensor) -> Tensor:
        """Return the matrices of counterclockwise rotations by angles in radians, (N,) to (N, 2, 2)."""
        return _matrices(angles.cos(), -angles.sin(), angles.sin(), angles.cos())


class Shear(_ByAngle):
    """Shear each image by an angle s of its own, drawn evenly from +-``degrees``.

    The place (x, y) of the result, from the centre, shows the image at (cos(s) x, y - sin(s) x), as in the authors'
    code: each column is moved along itself, and its distance from the middle one grows by 1 / cos(s). Beyond 90 degrees
    the cosine is negative, and the image mirrored besides; at 180 it is mirrored alone. A shear whose slope is the
    tangent has no such angles.

    Attributes:
        degrees: Largest angle, >= 0. Verma et al. (2019) test with 28.6, 57.3, 114.6, 143.2 and 171.9, which are 0.5,
            1, 2, 2.5 and 3 radians (tables 4 and 9).
    """

    @staticmethod
    def matrices(angles: Tensor) -> Tensor:
        """Return the matrices of shears by angles in radians, (N,) to (N, 2, 2)."""
        return _matrices(angles.cos(), torch.zeros_like(angles), -angles.sin(), torch.ones_like(angles))


@dataclass(frozen=True)
class Zoom:
    """Zoom all images about their centre: the result shows ``scale`` times the height and width of the image.

    Attributes:
        scale: > 0; below 1 zooms in, above 1 out. Verma et al. (2019) zoom in to 0.2, 0.4, 0.6 and 0.8, and out to 1.2,
            1.4, 1.6 and 1.8 (tables 4 and 9: "20 % rescaled" and so on).
    """

    scale: float

    def __post_init__(self) -> None:
        """Refuse a scale that is none."""
        check_number("scale", self.scale, "a number > 0", lambda scale: scale > 0, "1 changes nothing.")

    @property
    def name(self) -> str:
        """In log keys."""
        return f"zoom_{self.scale:g}"

    def __call__(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the images, as :func:`affine` makes them. Nothing is drawn.

        Args:
            images: Floating point, (N, C, H, W).
            rng: Not used.
        """
        return affine(images, self.scale * torch.eye(2, dtype=torch.float64).expand(len(images), 2, 2))


def paper_deformations() -> list[Rotation | Shear | Zoom]:
    """Return those of tables 4 and 9 of Verma et al. (2019)."""
    return [
        *map(Rotation, (20, 40, 60, 80)),
        *map(Shear, (28.6, 57.3, 114.6, 143.2, 171.9)),
        *map(Zoom, (0.2, 0.4, 0.6, 0.8, 1.2, 1.4, 1.6, 1.8)),
    ]


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Show at each place p of the result, in pixels from the centre, what the image has at ``matrix @ p``.

    Between pixels values are interpolated bilinearly; outside of the image they are 0, as in the authors' code: the
    mean colour where the mean has been subtracted, black where pixels are in [0, 1].

    Args:
        images: Floating point, (N, C, H, W).
        matrices: Of (x, y), x to the right and y down, (N, 2, 2).

    Returns:
        Images of the same shape, dtype and device.

    Raises:
        ValueError: If ``images`` are none.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point (N, C, H, W), got {images.dtype} {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    # the grid goes from -1 to 1 on both axes, however long they are
    lengths = torch.tensor([width, height], dtype=torch.float64)
    scaled = matrices.double().cpu() * lengths / lengths[:, None]
    theta = torch.cat([scaled, torch.zeros(len(images), 2, 1, dtype=torch.float64)], dim=2)
    exact = images if images.dtype == torch.float64 else images.float()
    grid = F.affine_grid(theta.to(exact), list(images.shape), align_corners=False)
    return F.grid_sample(exact, grid, mode="bilinear", padding_mode="zeros", align_corners=False).to(images.dtype)


def _matrices(*entries: Any) -> Tensor:
    return torch.stack(entries, dim=-1).reshape(-1, 2, 2)
