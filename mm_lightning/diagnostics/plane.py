"""A network as a function of a plane: the logits at its points, and the predicted classes on a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mm_lightning.evaluation.rows import class_logits

Extent = tuple[tuple[float, float], tuple[float, float]]
PlaneFunction = Callable[[Tensor], Tensor]


class PlaneMap(NamedTuple):
    """The predicted classes on a grid, beside the data."""

    x: np.ndarray  # of the columns, ascending, in equal steps, (W,)
    y: np.ndarray  # of the rows, (H,)
    confidence: np.ndarray  # probability of the most probable class, float32, (H, W)
    predicted: np.ndarray  # that class, int16, (H, W)
    num_classes: int
    points: np.ndarray  # the data, float32, (N, 2)
    targets: np.ndarray  # their class indices, integer, (N,)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the fields as arrays, for a ``.npz`` file."""
        return {name: np.asarray(value) for name, value in self._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> PlaneMap:
        """Make a map of the fields of a ``.npz`` file, as ``np.load`` returns it."""
        return cls(**{**arrays, "num_classes": int(arrays["num_classes"])})


def plane_axes(extent: Extent, resolution: int) -> tuple[Tensor, Tensor]:
    """Return ``resolution`` equidistant places on each axis, both ends included, float64.

    Example:
        >>> x, y = plane_axes(((-15, 15), (-15, 15)), 301)
        >>> round(float(x[1] - x[0]), 6), float(y[-1])
        (0.1, 15.0)
    """
    x, y = (torch.linspace(low, high, resolution, dtype=torch.float64) for low, high in extent)
    return x, y


def grid_points(x: Tensor, y: Tensor) -> Tensor:
    """Return the points of the grid, row after row of equal ``y``: (H * W, 2)."""
    return torch.cartesian_prod(y, x).flip(1)


class PlaneNetwork:
    """A network's logits as a function of points in the plane of its inputs, or of the outputs of one of its layers.

    In the second case the network runs on one input, and the layer's output is replaced by the points; what reaches the
    logits past the layer is that input's. The layers before it run on a single row, where a trial agrees with running
    them on a copy for each point, else on the copies.

    Args:
        module: The network.
        forward: Runs it on inputs (M, ...).
        row: The input, without the batch's axis; of two numbers if the points are inputs.
        layer: The layer's name, for errors.
        replaced: The layer; None puts the points in as inputs.
        probabilities: Whether the network returns probabilities, not logits.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Any, Tensor], Any],
        row: Tensor,
        layer: str,
        replaced: nn.Module | None,
        probabilities: bool = False,
    ) -> None:
        self.module = module
        self.forward = forward
        self.row = row
        self.layer = layer
        self.replaced = replaced
        self.probabilities = probabilities
        self._takes_one_row: bool | None = None

    def __call__(self, points: Tensor) -> Tensor:
        """Return logits as :func:`class_logits` does, (M, K) with K >= 2.

        Args:
            points: (M, 2). They reach the network in the dtype that the inputs, or the layer's outputs, have.

        Raises:
            RuntimeError: If the layer did not run exactly once.
            ValueError: If the layer's output is not two numbers a row, or the logits are not one row a point.
        """
        if self.replaced is None:
            # a clone: a first layer that works in place must not write on the points
            inputs = points.to(self.row).reshape(-1, *self.row.shape).clone()
            return class_logits(self.forward(self.module, inputs), len(points), self.probabilities)
        if self._takes_one_row is None and len(points) > 1:
            self._takes_one_row = self._agrees(points[:: -(-len(points) // 5)])
        return self._logits(points, 1 if self._takes_one_row else len(points))

    def _agrees(self, points: Tensor) -> bool:
        with torch.no_grad():
            try:
                got = self._logits(points, 1)
            except Exception:  # whatever a network raises that wants as many rows everywhere
                return False
            want = self._logits(points, len(points))
        return torch.allclose(got, want, rtol=0, atol=0.01 * float(want.abs().max()))

    def _logits(self, points: Tensor, copies: int) -> Tensor:
        assert self.replaced is not None
        runs = 0

        def hand_over(one: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            if len(output) != copies or output.numel() != 2 * copies:
                expected = f"Layer {self.layer!r} must return two numbers for each of {copies} inputs"
                raise ValueError(f"{expected}, got shape {tuple(output.shape)}.")
            return points.to(output).reshape(-1, *output.shape[1:]).clone()

        handle = self.replaced.register_forward_hook(hand_over)
        try:
            outputs = self.forward(self.module, self.row.repeat(copies, *[1] * self.row.ndim))
        finally:
            handle.remove()
        if runs != 1:
            raise RuntimeError(
                f"Layer {self.layer!r} must run once in a forward pass for points to take its output's place, it ran "
                f"{runs} times. Choose another layer, do not compile it, or pass forward=(module, inputs) -> logits."
            )
        return class_logits(outputs, len(points), self.probabilities)


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
