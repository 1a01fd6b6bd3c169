"""A network as a function of a plane: its logits there, how confident they are, how steep at the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Extent = tuple[tuple[float, float], tuple[float, float]]
PlaneFunction = Callable[[Tensor], Tensor]


class PlaneMap(NamedTuple):
    """The predicted classes over a plane, beside the data. ``PlaneMap(**np.load(path))`` reads a kept one."""

    x: np.ndarray  # of the columns, ascending, in equal steps, (W,)
    y: np.ndarray  # of the rows, (H,)
    confidence: np.ndarray  # probability of the most probable class, float32, (H, W)
    predicted: np.ndarray  # that class, int16, (H, W)
    num_classes: int
    points: np.ndarray  # the data, float32, (N, 2)
    targets: np.ndarray  # their class indices, integer, (N,)


def plane_axes(extent: Extent, resolution: int) -> tuple[Tensor, Tensor]:
    """Return ``resolution`` equidistant places on each axis, both ends included, float64.

    Example:
        >>> x, y = plane_axes(((-15, 15), (-15, 15)), 301)
        >>> round(float(x[1] - x[0]), 6), float(y[-1])
        (0.1, 15.0)
    """
    (x0, x1), (y0, y1) = extent
    return tuple(torch.linspace(a, b, resolution, dtype=torch.float64) for a, b in ((x0, x1), (y0, y1)))  # type: ignore[return-value]


def grid_points(x: Tensor, y: Tensor) -> Tensor:
    """Return the points of the grid, row after row of equal ``y``: (H * W, 2)."""
    return torch.cartesian_prod(y, x).flip(1)


def logits_from(
    module: nn.Module,
    forward: Callable[[Any, Tensor], Any],
    points: Tensor,
    row: Tensor,
    layer: str,
    replaced: nn.Module | None,
    probabilities: bool = False,
) -> Tensor:
    """Run a network on points of the plane of its inputs, or of the outputs of one of its layers.

    In the second case the network runs on copies of one input, and the layer's outputs are replaced by the points. What
    reaches the logits past the layer is that one input's.

    Args:
        module: The network.
        forward: Runs it on inputs (M, ...).
        points: (M, 2). They reach the network in the dtype that the inputs, or the layer's outputs, have.
        row: One input, without the batch's axis; of two numbers if the points are inputs.
        layer: The layer's name, for errors.
        replaced: The layer; None puts the points in as inputs.
        probabilities: Whether the network returns probabilities, not logits.

    Returns:
        Logits, (M, K) with K >= 2, as :func:`class_logits` returns them.

    Raises:
        RuntimeError: If the layer did not run exactly once.
        ValueError: If the layer's outputs are not two numbers a row, or the logits not one row a point.
    """
    if replaced is None:
        # a clone: a first layer that works in place must not write on the points
        outputs = forward(module, points.to(row).reshape(-1, *row.shape).clone())
        return class_logits(outputs, len(points), probabilities)
    runs = 0

    def hand_over(one: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if len(output) != len(points) or output.numel() != 2 * len(points):
            expected = f"Layer {layer!r} must return two numbers for each of {len(points)} inputs"
            raise ValueError(f"{expected}, got shape {tuple(output.shape)}.")
        return points.to(output).reshape(output.shape).clone()

    handle = replaced.register_forward_hook(hand_over)
    try:
        outputs = forward(module, row.repeat(len(points), *[1] * row.ndim))
    finally:
        handle.remove()
    if runs != 1:
        raise RuntimeError(
            f"Layer {layer!r} must run once in a forward pass for points to take its output's place, it ran {runs} "
            "times. Choose another layer, do not compile it, or pass forward=(module, inputs) -> logits."
        )
    return class_logits(outputs, len(points), probabilities)


def class_logits(outputs: Any, rows: int, probabilities: bool = False) -> Tensor:
    """Return a network's outputs as logits of two classes or more, in float32 or better.

    Args:
        outputs: Logits (rows, K), or the one logit of class 1 against class 0, (rows,) or (rows, 1).
        rows: Number of rows expected.
        probabilities: Whether the outputs are probabilities; their logarithms are then the logits.

    Returns:
        (rows, K) with K >= 2; their softmax are the probabilities.

    Raises:
        TypeError: If the outputs are no floating point tensor.
        ValueError: If their shape is another one, or they should be probabilities and are none.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"forward must return logits, a floating point tensor, got {kind}. Pass forward=...")
    if outputs.ndim not in (1, 2) or len(outputs) != rows or not outputs.numel():
        raise ValueError(
            f"forward must return logits ({rows}, K) for {rows} inputs, got shape {tuple(outputs.shape)}. Pass forward=..."
        )
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(rows, -1)
    if probabilities:
        if outputs.shape[1] == 1:
            outputs = torch.cat([1 - outputs, outputs], dim=1)
        off = float((outputs.sum(dim=1) - 1).abs().max())
        if outputs.min() < 0 or off > 0.02:  # as far as bfloat16 may be off
            least = float(outputs.min())
            raise ValueError(f"Outputs must be probabilities, got {least:.3g} and a sum {off:.3g} away from 1.")
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
    return torch.cat([torch.zeros_like(outputs), outputs], dim=1) if outputs.shape[1] == 1 else outputs


def evaluate_plane(
    logits_at: PlaneFunction, x: Tensor, y: Tensor, points: Tensor, targets: Tensor, batch_size: int
) -> PlaneMap:
    """Evaluate a network on a grid, without gradients.

    Args:
        logits_at: Returns the logits (M, K) of points (M, 2).
        x: Places of the columns, (W,).
        y: Places of the rows, (H,).
        points: The data in the plane, (N, 2); kept beside the map.
        targets: Their class indices, (N,).
        batch_size: Grid points per call.
    """
    parts = []
    with torch.no_grad():
        for part in grid_points(x, y).split(batch_size):
            logits = logits_at(part)
            num_classes = logits.shape[1]
            parts.append(logits.softmax(dim=1).max(dim=1))
    shape = len(y), len(x)
    confidence = torch.cat([part.values for part in parts]).float().cpu().reshape(shape).numpy()
    predicted = torch.cat([part.indices for part in parts]).short().cpu().reshape(shape).numpy()
    return PlaneMap(x.numpy(), y.numpy(), confidence, predicted, num_classes, points.float().numpy(), targets.numpy())


def p_class1(confidence: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the probability of class 1 of two, from the larger probability and whose it is."""
    return np.where(predicted == 1, confidence, 1 - confidence)


def low_confidence(confidence: np.ndarray, threshold: float, where: np.ndarray | None = None) -> float:
    """Return the share of the grid points, or of those ``where`` marks, whose top probability is below ``threshold``."""
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


def plane_numbers(found: PlaneMap, logits_at: PlaneFunction, threshold: float, band: float, batch_size: int) -> dict[str, float]:
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
    reach = math.ceil(radius / step) + 1
    nearest = np.rint((values - axis[0]) / step)
    index = (np.clip(nearest, -1 - reach, len(axis) + reach)[:, None] + np.arange(-reach, reach + 1)).astype(np.int64)
    outside = (index < 0) | (index >= len(axis))
    index = index.clip(0, len(axis) - 1)
    return index, np.where(outside, np.inf, axis[index] - values[:, None])  # both (N, 2 * reach + 1)
