"""Maps of a whole training, small enough to stay in memory and in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm_lightning.diagnostics.plane import PlaneMap

Frame = dict[str, Tensor]  # tensors, not arrays: checkpoints are read with weights_only=True

MAX_POINTS = 1000


def packed(found: PlaneMap, epoch: int) -> Frame:
    """Make a frame of a map, with one byte for each confidence, and with at most 1,000 points, evenly picked.

    The byte is ``round(255 * (confidence - 1 / K) / (1 - 1 / K))``: 0 stands for 1 / K and 255 for 1.
    """
    least = 1 / found.num_classes
    scaled = 255 * (found.confidence.astype(np.float64) - least) / (1 - least)
    picked = slice(None, None, max(1, -(-len(found.points) // MAX_POINTS)))  # the same rows in every epoch
    classes = np.uint8 if found.num_classes <= 256 else np.int16
    arrays = {
        "epoch": np.array(epoch),
        "num_classes": np.array(found.num_classes),
        "x": found.x,
        "y": found.y,
        "confidence": np.rint(scaled).astype(np.uint8),
        "predicted": found.predicted.astype(classes),
        "points": found.points[picked],
        "targets": found.targets[picked],
    }
    return {name: torch.from_numpy(array).clone() for name, array in arrays.items()}


def unpacked(frame: Frame) -> PlaneMap:
    """Return the map of a frame, whose confidence is at most 1 / 510 off."""
    arrays = {name: tensor.numpy() for name, tensor in frame.items() if name != "epoch"}
    num_classes = int(arrays.pop("num_classes"))
    confidence = 1 / num_classes + arrays.pop("confidence") / 255 * (1 - 1 / num_classes)
    predicted = arrays.pop("predicted").astype(np.int16)
    return PlaneMap(confidence=confidence.astype(np.float32), predicted=predicted, num_classes=num_classes, **arrays)


def stacked(frames: Sequence[Frame]) -> dict[str, np.ndarray]:
    """Stack the frames of T epochs; where they have different numbers of points, the surplus goes.

    Returns:
        ``epochs`` (T,), counted from 0, ``num_classes``, ``x`` (T, W), ``y`` (T, H), ``confidence`` and ``predicted``
        (T, H, W) as in :func:`packed`, ``points`` (T, N, 2) and ``targets`` (T, N): in a hidden plane the points move.
    """
    fewest = min(len(frame["points"]) for frame in frames)
    cut = [frame | {name: frame[name][:fewest] for name in ("points", "targets")} for frame in frames]
    arrays = {name: torch.stack([frame[name] for frame in cut]).numpy() for name in cut[0]}
    return {"epochs": arrays.pop("epoch"), "num_classes": arrays.pop("num_classes")[0], **arrays}
