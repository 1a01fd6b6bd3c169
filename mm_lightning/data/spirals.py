"""Two spirals: a small data set in the plane, drawn from a seed, and its LightningDataModule."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import check_count, check_number
from mm_lightning.data.tensor_data_module import TensorDataModule, check_seed, seed_of_data

_ARM_END = math.radians(780)  # the angle at an arm's end, and its distance from the origin there

# One seed, independent draws. ManifoldMixupCallback draws from the streams 0 and 1 of the same seed.
_POINTS_STREAM, _SPLIT_STREAM = 2, 3


def two_spirals(num_points: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the points of two interleaved spirals.

    With u, v, w uniform in [0, 1) and n = sqrt(u) * 780 degrees, in radians, a point of class 0 is
    ``(-cos(n) * n + noise * v, sin(n) * n + noise * w)``. Class 1 is the mirror image of these very points through the
    origin, noise included: row ``num_points + i`` is minus row i. Without noise both arms end 13.6 from the origin, and
    along any ray from it the two classes take turns, pi apart. The noise is one-sided: its mean moves class 0 by
    ``noise / 2`` in both coordinates, and class 1 the other way.

    The formula is that of github.com/rahulmadanahalli/manifold_mixup, a TensorFlow implementation of manifold mixup.

    Args:
        num_points: Points of each class, >= 1.
        noise: Upper end of the shift in each coordinate, >= 0, in the unit of the points.
        seed: In [0, 2**32). The same arguments give the same points.

    Returns:
        Points float32 (2 * num_points, 2), and targets int64 (2 * num_points,): all of class 0, then all of class 1.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is outside its range.

    Example:
        >>> points, targets = two_spirals(num_points=1, noise=0.0, seed=0)
        >>> torch.equal(points[1], -points[0]), targets
        (True, tensor([0, 1]))
    """
    check_count("num_points", num_points, 1, "It counts the points of one class.")
    _check_noise(noise)
    check_seed("seed", seed)
    u, v, w = _rng(seed, _POINTS_STREAM).random((num_points, 3)).T
    angle = np.sqrt(u) * _ARM_END
    arm = np.stack([-np.cos(angle) * angle + noise * v, np.sin(angle) * angle + noise * w], axis=1)
    points = torch.from_numpy(np.concatenate([arm, -arm]).astype(np.float32))
    return points, torch.arange(2).repeat_interleave(num_points)


class SpiralsDataModule(TensorDataModule):
    """The two spirals of :func:`two_spirals`: 81 % to train, 9 % to validate, 10 % to test.

    Batches are ``(points, targets)``: float32 (N, 2) and int64 (N,). The split is drawn without regard to class and
    mirror image: for most test points, the mirror image is a training point of the other class.

    Args:
        num_points: Points of each class, >= 3; 2000 make 3240 to train, 360 to validate and 400 to test.
        noise: Upper end of the shift in each coordinate, >= 0 (see ``two_spirals``).
        batch_size: Training points per batch, on each device.
        eval_batch_size: Points per batch in validation, test and prediction, on each device.
        seed: Seed of the points, of their split and of the training order, in [0, 2**32).
        data_seed: Seed of the points and of their split alone, so that runs that differ in ``seed`` share their data.
            None takes ``seed``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    num_classes = 2
    class_names = ("0", "1")
    input_shape = (2,)
    row_name = "point"

    def __init__(
        self,
        num_points: int = 2000,
        noise: float = 0.9,
        batch_size: int = 20,
        eval_batch_size: int = 1000,
        seed: int = 0,
        data_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        # 6 points are 4 to train, 1 to validate and 1 to test
        check_count("num_points", num_points, 3, "Fewer leave a split without points.")
        _check_noise(noise)
        self.num_points = num_points
        self.noise = noise
        self.data_seed = seed_of_data(seed, data_seed)

    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Draw the points and split them, as ``load_splits`` of :class:`TensorDataModule` documents it."""
        points, targets = two_spirals(self.num_points, self.noise, self.data_seed)
        order = torch.from_numpy(_rng(self.data_seed, _SPLIT_STREAM).permutation(len(points)))
        num_fit = round(0.9 * len(order))  # to train and validate
        num_train = round(0.9 * num_fit)
        rows = {"train": order[:num_train], "val": order[num_train:num_fit], "test": order[num_fit:]}
        return {name: (points[own], targets[own]) for name, own in rows.items()}


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def _check_noise(noise: Any) -> None:
    way_out = "0 leaves the points on the spirals."
    check_number("noise", noise, "a finite number >= 0", lambda noise: 0 <= noise < math.inf, way_out)
