"""Segmentation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from zoo.entry import Entry, Module, classes, reals, seeded, targets

K, IGNORE = 3, 255


class UNet(Module):
    """One level; the skip connection starts behind the first double convolution."""

    def __init__(self, out_channels: int = K) -> None:
        super().__init__()
        self.inc = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv, self.outc = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        x = self.up(self.down(skip))
        return self.outc(F.relu(self.conv(torch.cat([skip, x], dim=1))))


class PixelCrossEntropy(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.iou = MulticlassJaccardIndex(K)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("train/iou", self.iou(logits.argmax(dim=1), y))
        return loss


class IgnoredBorder(UNet):
    """uint8 masks, in which 255 marks the border between objects; a channel of size 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, masks = batch["image"], batch["mask"]
        masks = masks.squeeze(1).long()
        masks[masks == IGNORE] = -100
        return F.cross_entropy(self(images), masks, ignore_index=-100)


class ValidPixels(UNet):
    """Logits and targets of the valid pixels alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x).permute(0, 2, 3, 1)
        valid = y != IGNORE
        return F.cross_entropy(logits[valid], y[valid])


class DiceLoss(nn.Module):
    """1 - Dice, over the batch for each class."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        probs = logits.softmax(dim=1)
        one_hot = F.one_hot(target, num_classes=logits.shape[1]).permute(0, 3, 1, 2).to(probs.dtype)
        intersection = torch.sum(probs * one_hot, dim=(0, 2, 3))
        cardinality = torch.sum(probs + one_hot, dim=(0, 2, 3))
        return 1 - (2.0 * intersection / (cardinality + 1e-7)).mean()


class Dice(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.ce, self.dice = nn.CrossEntropyLoss(), DiceLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        return 0.5 * self.ce(logits, y) + 0.5 * self.dice(logits, y)


class BinaryDice(UNet):
    """BCE and a Dice loss written in the step, on masks (N, H, W)."""

    def __init__(self) -> None:
        super().__init__(out_channels=1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        mask = y.unsqueeze(1).to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, mask)
        p, m = torch.sigmoid(logits).flatten(1), mask.flatten(1)
        dice = 1 - (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)
        return bce + dice.mean()


class Tversky(UNet):
    """Focal Tversky loss, the positives and negatives counted from a comparison."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        probs, total = self(x).softmax(dim=1), 0.0
        for k in range(K):
            p, t = probs[:, k].reshape(-1), (y == k).reshape(-1).to(probs.dtype)
            tp, fp, fn = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
            total = total + (1 - (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)) ** 0.75
        return total / K


def _masks() -> Any:
    return reals(1, 4, 4), classes(K, 4, 4)


def _bordered() -> Any:
    x, y = _masks()
    return x, y.masked_fill(reals(4, 4, seed=7) > 1, IGNORE)


def _bytes() -> Any:
    x, y = _bordered()
    return {"image": x, "mask": y.unsqueeze(1).to(torch.uint8), "id": ["a", "b", "c", "d", "e", "f"]}


def _entry(name: str, style: str, module: Any, batch: Any = _masks, of: Any = None, **more: Any) -> Entry:
    return Entry(name, "segmentation", style, seeded(module), batch, of or targets(1), ("inc",), **more)


ENTRIES = [
    _entry("PixelCrossEntropy", "F.cross_entropy on (N, H, W), torchmetrics", PixelCrossEntropy),
    _entry(
        "IgnoredBorder",
        "F.cross_entropy, 255 in uint8 masks replaced in place",
        IgnoredBorder,
        _bytes,
        targets("mask"),
    ),
    _entry("ValidPixels", "F.cross_entropy(logits[valid], y[valid])", ValidPixels, _bordered),
    _entry("Dice", "CrossEntropyLoss + Dice by one_hot and permute", Dice),
    _entry("Dice, named", "the same with loss=[...]", Dice, options={"loss": ["ce", "dice"]}),
    _entry("BinaryDice", "BCE + Dice in the step", BinaryDice, lambda: (reals(1, 4, 4), classes(2, 4, 4))),
    _entry("Tversky", "focal Tversky, a loop over y == k", Tversky),
]
