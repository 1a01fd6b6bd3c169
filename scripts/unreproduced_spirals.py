"""What input mixup does to the labels of two spirals, by the geometry of the points alone: nothing is trained."""

from __future__ import annotations

import math

import numpy as np
import torch

from mm_lightning.data.spirals import two_spirals

CELL = 0.2  # side of the squares that labels are gathered in; the arms lie pi apart
HALF = 15.0  # the plane is [-HALF, HALF] squared


def kept_spirals(num_points: int, noise: float, turns: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 2) and classes (N,) within so many turns of the arms."""
    points, targets = (part.numpy() for part in two_spirals(num_points, noise, seed))
    kept = np.linalg.norm(points, axis=1) <= 2 * math.pi * turns
    return points[kept].astype(np.float64), targets[kept]


def mixed_points(
    points: np.ndarray, targets: np.ndarray, alpha: float, pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix random pairs: points (P, 2), the weight of class 1 (P,), and whether both are of one class (P,)."""
    own, partner = rng.integers(len(points), size=(2, pairs))
    lam = rng.beta(alpha, alpha, size=pairs)
    mixed = lam[:, None] * points[own] + (1 - lam)[:, None] * points[partner]
    return mixed, lam * targets[own] + (1 - lam) * targets[partner], targets[own] == targets[partner]


def wrong_labels(
    points: np.ndarray, targets: np.ndarray, alpha: float, pairs: int, rng: np.random.Generator
) -> dict[str, float]:
    """How often a mixed point lies nearest to a point of another class than its larger weight.

    Args:
        points: The data, (N, 2).
        targets: Their classes, 0 or 1, (N,).
        alpha: ``lam ~ Beta(alpha, alpha)``.
        pairs: So many are drawn.
        rng: Draws them.

    Returns:
        ``wrong``: that share of all pairs. ``wrong_same``: of those of one class, whose label is certain.
    """
    mixed, weight, same = mixed_points(points, targets, alpha, pairs, rng)
    nearest = [
        torch.cdist(part, torch.from_numpy(points)).argmin(dim=1) for part in torch.from_numpy(mixed).split(1000)
    ]
    wrong = targets[torch.cat(nearest).numpy()] != (weight > 0.5)
    return {"wrong": float(wrong.mean()), "wrong_same": float(wrong[same].mean())}


def best_accuracy(points: np.ndarray, targets: np.ndarray, alpha: float, pairs: int, rng: np.random.Generator) -> float:
    """Share of the unmixed points that lie where mixed points have, on average, a label nearer to their own class.

    So many has a classifier right that minimises the loss of mixed points, at the resolution of CELL. Where batches are
    small, some points are their own partners, and it has more.
    """
    side = round(2 * HALF / CELL)

    def cells(places: np.ndarray) -> np.ndarray:
        column, row = np.floor((places + HALF) / CELL).astype(np.int64).clip(0, side - 1).T
        return row * side + column

    weights, counts = np.zeros(side**2), np.zeros(side**2)
    for _ in range(0, pairs, 1_000_000):
        mixed, weight, _ = mixed_points(points, targets, alpha, min(pairs, 1_000_000), rng)
        where = cells(mixed)
        weights += np.bincount(where, weight, side**2)
        counts += np.bincount(where, minlength=side**2)
    own = cells(points)
    with np.errstate(invalid="ignore"):
        mean = (weights / counts)[own]
    return float(((mean > 0.5) == (targets == 1))[~np.isnan(mean)].mean())


def geometry(alpha: float, noise: float, turns: float, seed: int = 0) -> dict[str, float]:
    """The three numbers for 20,000 pairs, and 4 million."""
    points, targets = kept_spirals(2_000, noise, turns, seed)
    found = wrong_labels(points, targets, alpha, 20_000, np.random.default_rng(seed))
    dense = kept_spirals(100_000, noise, turns, seed)
    return {**found, "best_accuracy": best_accuracy(*dense, alpha, 4_000_000, np.random.default_rng(seed))}
