"""Numbers of a map: how much of the plane has low confidence, and how steep the decision boundary is near the data."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mm_lightning.diagnostics.plane import PlaneFunction, PlaneMap


def p_class1(confidence: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the probability of class 1 of two, from the larger probability and whose it is."""
    return np.where(predicted == 1, confidence, 1 - confidence)


def low_confidence(confidence: np.ndarray, threshold: float, where: np.ndarray | None = None) -> float:
    """Return the share of the grid points, or of those in ``where``, whose top probability is below ``threshold``."""
    chosen = confidence if where is None else confidence[where]
    return float((chosen < threshold).mean())


def near_points(x: np.ndarray, y: np.ndarray, points: np.ndarray, radius: float) -> np.ndarray:
    """Mark the grid points that have a data point within ``radius``, which counts as near.

    Args:
        x: Places of the columns in equal steps, (W,) with W >= 2.
        y: Places of the rows in equal steps, (H,) with H >= 2.
        points: Finite, (N, 2).
        radius: Euclidean distance.

    Returns:
        Boolean, (H, W).
    """
    x, y, points = x.astype(np.float64), y.astype(np.float64), points.astype(np.float64)
    column, to_x = _places_around(x, points[:, 0], radius)
    row, to_y = _places_around(y, points[:, 1], radius)
    near = np.zeros((len(y), len(x)), dtype=bool)
    # only the places in the square around each point are compared, one row of all squares at a time
    for i in range(row.shape[1]):
        inside = (to_x**2 + to_y[:, i : i + 1] ** 2 <= radius**2).nonzero()
        near[row[inside[0], i], column[inside]] = True
    return near


def at_boundary(predicted: np.ndarray) -> np.ndarray:
    """Mark the grid points that have another class predicted above, below, to the left or to the right, (H, W)."""
    boundary = np.zeros(predicted.shape, dtype=bool)
    across, along = predicted[:, 1:] != predicted[:, :-1], predicted[1:] != predicted[:-1]
    boundary[:, 1:] |= across
    boundary[:, :-1] |= across
    boundary[1:] |= along
    boundary[:-1] |= along
    return boundary


def margin_slopes(logits_at: PlaneFunction, points: Tensor, batch_size: int) -> Tensor:
    """Return how steep the margin, largest minus second largest logit, is at points.

    Args:
        logits_at: Returns the logits (M, K) of points (M, 2), each row by itself.
        points: (M, 2).
        batch_size: Points per call.

    Returns:
        L2 norm of the margin's gradient, per unit of the plane, (M,).
    """
    slopes = []
    with torch.enable_grad():
        for part in points.split(batch_size):
            part = part.detach().clone().requires_grad_()
            largest, second = logits_at(part).topk(2, dim=1).values.unbind(dim=1)
            (gradient,) = torch.autograd.grad((largest - second).sum(), part)
            slopes.append(gradient.norm(dim=1))
    return torch.cat(slopes)


def plane_numbers(
    found: PlaneMap, logits_at: PlaneFunction, threshold: float, band: float, batch_size: int
) -> dict[str, float]:
    """Return the numbers that :class:`ConfidenceMap` logs; those without a grid point to take them at are left out.

    Args:
        found: The map.
        logits_at: The network that the map is of.
        threshold: Confidence below it is low.
        band: How far from a data point is near, as a fraction of the map's longer side.
        batch_size: Points per call of ``logits_at``.
    """
    numbers = {"low_confidence": low_confidence(found.confidence, threshold)}
    side = max(np.ptp(found.x), np.ptp(found.y))
    near = near_points(found.x, found.y, found.points, band * side)
    if near.any():
        numbers["low_confidence_near_data"] = low_confidence(found.confidence, threshold, near)
    rows, columns = (near & at_boundary(found.predicted)).nonzero()
    if len(rows):
        points = torch.from_numpy(np.stack([found.x[columns], found.y[rows]], axis=1))
        numbers["boundary_slope"] = margin_slopes(logits_at, points, batch_size).mean().item()
    return numbers


def _places_around(axis: np.ndarray, values: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    step = (axis[-1] - axis[0]) / (len(axis) - 1)
    reach = math.ceil(radius / step)
    nearest = np.rint((values - axis[0]) / step).clip(0, len(axis) - 1).astype(np.int64)
    index = (nearest[:, None] + np.arange(-reach, reach + 1)).clip(0, len(axis) - 1)
    return index, axis[index] - values[:, None]  # both (N, 2 * reach + 1)
