"""Tables: categorical and continuous columns, one label, several or none."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from zoo.entry import Entry, Module, classes, reals, seeded, targets

K = 3


class ClickModel(Module):
    """A dict of categorical and continuous columns; one logit, rare positives."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(4, 3), nn.Embedding(4, 3)])
        self.mlp = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
        self.auroc = BinaryAUROC()

    def forward(self, categorical: Tensor, continuous: Tensor) -> Tensor:
        columns = [embedding(categorical[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.mlp(torch.cat([*columns, continuous], dim=1)).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, target = self(batch["categorical"], batch["continuous"]), batch["target"]
        loss = self.criterion(logits, target)
        self.auroc(logits, target.long())
        self.log("train/auroc", self.auroc, on_step=False, on_epoch=True, batch_size=len(target))
        return loss


class Perceptron(Module):
    def __init__(self, outputs: int = K) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.encoder(x)))


class MultiLabel(Perceptron):
    """Integer labels, cast in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype))
        hits = ((logits.sigmoid() > 0.5).int() == y).all(dim=1)
        self.log("exact_match", hits.double().mean())
        return loss


class AsymmetricLoss(nn.Module):
    """Ben-Baruch et al., 2020: negatives are clipped and focused more than positives."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        positive = torch.sigmoid(x)
        negative = (1 - positive + 0.05).clamp(max=1)
        loss = y * torch.log(positive.clamp(min=1e-8)) + (1 - y) * torch.log(negative.clamp(min=1e-8))
        with torch.no_grad():
            pt = positive * y + negative * (1 - y)
            weight = torch.pow(1 - pt, 1 * y + 4 * (1 - y))
        return -(loss * weight).sum()


class Asymmetric(Perceptron):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = AsymmetricLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self(batch[0]), batch[1])


class Probability(Perceptron):
    """A sigmoid in the step and BCE on probabilities."""

    def __init__(self) -> None:
        super().__init__(outputs=1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        y_hat = torch.sigmoid(self(x)).view(-1)
        return F.binary_cross_entropy(y_hat, y.type_as(y_hat))


class Columns(NamedTuple):
    features: Tensor
    label: Tensor


class NamedColumns(Perceptron):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self(batch.features), batch.label), "n": len(batch.label)}


@dataclasses.dataclass
class Sample:
    features: Tensor
    label: Tensor
    weight: Tensor


class SampleWeights(Perceptron):
    """A weight for each label, from the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = F.cross_entropy(self(batch.features), batch.label, reduction="none")
        return (losses * batch.weight).mean()


class Ordinal(Perceptron):
    """Levels: is y above 0, above 1, above 2?"""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        levels = (y[:, None] > torch.arange(K, device=y.device)[None, :]).to(logits.dtype)
        loss = -(F.logsigmoid(logits) * levels + (F.logsigmoid(logits) - logits) * (1 - levels)).sum(dim=1)
        self.log("mae", ((logits > 0).sum(dim=1) - y).abs().double().mean())
        return loss.mean()


class Survival(Perceptron):
    """Cox's partial likelihood: every row is compared with all that outlived it."""

    def __init__(self) -> None:
        super().__init__(outputs=1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, time, event = batch
        risk = self(x).squeeze(1)
        at_risk = (time[None, :] >= time[:, None]).to(risk.dtype)
        log_sum = torch.log((at_risk * risk.exp()[None, :]).sum(dim=1))
        return -((risk - log_sum) * event).sum() / event.sum().clamp(min=1)


def _clicks() -> Any:
    return {
        "categorical": classes(4, 2),
        "continuous": reals(3),
        "target": classes(2, seed=5).double(),
    }


def _entry(name: str, style: str, module: Any, batch: Any, of: Any = None, **more: Any) -> Entry:
    return Entry(name, "tabular", style, seeded(module), batch, of or targets(1), ("encoder",), **more)


ENTRIES = [
    Entry(
        "ClickModel",
        "tabular",
        "BCEWithLogitsLoss with pos_weight, batch of a dict",
        seeded(ClickModel),
        _clicks,
        targets("target"),
        ("mlp.1",),
    ),
    _entry(
        "MultiLabel",
        "F.binary_cross_entropy_with_logits on cast integer labels",
        MultiLabel,
        lambda: (reals(4), classes(2, K)),
    ),
    _entry(
        "Asymmetric",
        "asymmetric loss by hand, weights under no_grad",
        Asymmetric,
        lambda: (reals(4), classes(2, K).double()),
    ),
    _entry(
        "Probability", "F.binary_cross_entropy on probabilities", Probability, lambda: (reals(4), classes(2, seed=5))
    ),
    _entry(
        "NamedColumns",
        "F.cross_entropy, batch of a named tuple, returns a dict",
        NamedColumns,
        lambda: Columns(reals(4), classes(K)),
        targets("label"),
    ),
    _entry(
        "SampleWeights",
        "F.cross_entropy without reduction times weights of a dataclass batch",
        SampleWeights,
        lambda: Sample(reals(4), classes(K), reals(seed=4).abs()),
        targets("label", "weight"),
    ),
    _entry("Ordinal", "levels y > 0, 1, 2 and logsigmoid by hand", Ordinal, lambda: (reals(4), classes(K + 1))),
    _entry(
        "Survival",
        "Cox's partial likelihood: rows are compared by their targets",
        Survival,
        lambda: (reals(4), reals(seed=3).exp(), classes(2, seed=5).double()),
        targets(1, 2),
    ),
]
