"""Regression and forecasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torchmetrics import MeanAbsoluteError

from zoo.entry import Entry, Module, classes, everything, reals, seeded, targets


class Regressor(Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.encoder(x)))


class WithCriterion(Regressor):
    """Targets (N,) that the step gives a column."""

    def __init__(self, criterion: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.criterion = criterion()
        self.train_mae = MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        y = y.unsqueeze(1)
        y_hat = self(x)
        loss = self.criterion(y_hat, y)
        self.train_mae(y_hat, y)
        self.log("train/mae", self.train_mae, on_step=True, on_epoch=True)
        return loss


class SquaredByHand(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = ((self(x).view(-1) - y.view(-1)) ** 2).mean()
        self.log("rmse", loss.detach().sqrt())
        return loss


class RootMeanSquared(Regressor):
    """A function of the loss, which mixing must stay outside of."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return torch.sqrt(F.mse_loss(self(x).squeeze(-1), y) + 1e-8)


class Standardized(Regressor):
    """Targets are standardized by statistics in buffers, on a log scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.3))
        self.register_buffer("std", torch.tensor(1.7))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        target = (torch.log1p(y) - self.mean) / self.std
        return F.mse_loss(self(x)[:, 0], target)


class Gaussian(Regressor):
    def __init__(self) -> None:
        super().__init__(outputs=2)
        self.nll = nn.GaussianNLLLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        mean, raw = self(x).chunk(2, dim=1)
        return self.nll(mean, y.view(-1, 1), F.softplus(raw))


class Distribution(Regressor):
    def __init__(self) -> None:
        super().__init__(outputs=2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loc, log_scale = self(x).unbind(dim=1)
        return -Normal(loc, log_scale.exp()).log_prob(y).mean()


class Counts(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.PoissonNLLLoss(log_input=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, counts = batch
        return self.loss(self(x).squeeze(1), counts.to(x.dtype))


class Quantiles(Regressor):
    """Pinball loss of three quantiles."""

    def __init__(self) -> None:
        super().__init__(outputs=3)
        self.quantiles = (0.1, 0.5, 0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        preds, losses = self(x), []
        for i, q in enumerate(self.quantiles):
            errors = y - preds[:, i]
            losses.append(torch.max((q - 1) * errors, q * errors).unsqueeze(1))
        return torch.mean(torch.sum(torch.cat(losses, dim=1), dim=1))


class LogCosh(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        error = self(x) - y[:, None]
        return torch.mean(error + F.softplus(-2.0 * error) - torch.log(torch.tensor(2.0)))


class PoseAndSize(Regressor):
    """One target tensor, one loss for each slice of its columns."""

    def __init__(self) -> None:
        super().__init__(outputs=5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        position = F.mse_loss(out[:, :2], y[:, :2])
        size = F.l1_loss(out[:, 2:4], y[:, 2:4])
        angle = (1 - torch.cos(out[:, 4] - y[:, 4])).mean()
        self.log_dict({"position": position, "size": size, "angle": angle})
        return position + size + 0.1 * angle


class BoxAndClass(Regressor):
    """Detection of one object: smooth L1 on the box where there is one, cross-entropy on the class."""

    def __init__(self) -> None:
        super().__init__(outputs=7)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, target = batch
        boxes, logits = self(x).split([4, 3], dim=1)
        found = target["labels"] > 0
        box_loss = F.smooth_l1_loss(boxes[found], target["boxes"][found], beta=0.5, reduction="sum")
        return F.cross_entropy(logits, target["labels"]) + box_loss / max(int(found.sum()), 1)


class ConcordanceLoss(Regressor):
    """1 - Lin's concordance: a ratio of moments of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        p = self(x).squeeze(1)
        covariance = ((p - p.mean()) * (y - y.mean())).mean()
        return 1 - 2 * covariance / (p.var(unbiased=False) + y.var(unbiased=False) + (p.mean() - y.mean()) ** 2)


class Forecaster(Module):
    """Past and future are cut from one series."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (series,) = batch
        past, future = series[:, :5], series[:, 5:]
        return F.l1_loss(self.decoder(torch.tanh(self.encoder(past))), future)


def _batch() -> Any:
    return reals(4), reals(seed=3)


def _positive() -> Any:
    return reals(4), reals(seed=3).abs()


def _entry(name: str, style: str, make: Any, batch: Any = _batch, **more: Any) -> Entry:
    return Entry(name, "regression", style, make, batch, targets(1), ("encoder",), **more)


ENTRIES = [
    _entry("MSE", "nn.MSELoss on y.unsqueeze(1), torchmetrics", seeded(WithCriterion, nn.MSELoss)),
    _entry("L1", "nn.L1Loss on y.unsqueeze(1)", seeded(WithCriterion, nn.L1Loss)),
    _entry("Huber", "nn.HuberLoss on y.unsqueeze(1)", seeded(WithCriterion, nn.HuberLoss)),
    _entry("SmoothL1", "nn.SmoothL1Loss on y.unsqueeze(1)", seeded(WithCriterion, nn.SmoothL1Loss)),
    _entry("SquaredByHand", "((y_hat - y) ** 2).mean()", seeded(SquaredByHand)),
    _entry("RootMeanSquared", "square root of F.mse_loss", seeded(RootMeanSquared)),
    _entry("Standardized", "F.mse_loss on (log1p(y) - mean) / std", seeded(Standardized), _positive),
    _entry("Gaussian", "nn.GaussianNLLLoss with a learned variance", seeded(Gaussian)),
    _entry("Distribution", "-Normal(loc, scale).log_prob(y)", seeded(Distribution)),
    _entry("Counts", "nn.PoissonNLLLoss on integer counts", seeded(Counts), lambda: (reals(4), classes(7))),
    _entry("Quantiles", "pinball loss by hand, torch.max", seeded(Quantiles)),
    _entry("LogCosh", "log cosh by hand", seeded(LogCosh)),
    _entry(
        "PoseAndSize",
        "MSE, L1 and cosine on slices of the targets",
        seeded(PoseAndSize),
        lambda: (reals(4), reals(5, seed=3)),
    ),
    _entry(
        "BoxAndClass",
        "F.cross_entropy + F.smooth_l1_loss on rows with an object",
        seeded(BoxAndClass),
        lambda: (reals(4), {"boxes": reals(4, seed=4), "labels": classes(3, seed=5)}),
    ),
    _entry("ConcordanceLoss", "ratio of the batch's moments, by hand", seeded(ConcordanceLoss)),
    Entry(
        "Forecaster",
        "forecasting",
        "F.l1_loss on the end of the input series",
        seeded(Forecaster),
        lambda: (reals(8),),
        everything,
        ("encoder",),
        moves_inputs=True,
    ),
]
