"""Metric learning: margins, centres, proxies and pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import ROWS, SEVERAL_PASSES, Entry, Module, classes, reals, seeded, targets

K, D = 3, 4


class Embedder(Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.project = nn.Linear(8, D)
        self.weight = nn.Parameter(torch.randn(K, D))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.project(self.encoder(x)))


class ArcMarginProduct(nn.Module):
    """The labels go into the head."""

    def __init__(self, s: float = 4.0, m: float = 0.3) -> None:
        super().__init__()
        self.weight, self.s, self.m = nn.Parameter(torch.randn(K, D)), s, m

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(embedding), F.normalize(self.weight))
        phi = torch.cos(torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) + self.m)
        one_hot = torch.zeros(cosine.size(), dtype=cosine.dtype, device=cosine.device)
        one_hot.scatter_(1, label.view(-1, 1).long(), 1)
        return ((one_hot * phi) + ((1.0 - one_hot) * cosine)) * self.s


class ArcFace(Embedder):
    def __init__(self) -> None:
        super().__init__()
        self.head = ArcMarginProduct()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.head(self(x), y), y)


class CosFace(Embedder):
    """The margin is subtracted in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = F.linear(self(x), F.normalize(self.weight))
        logits[range(len(y)), y] -= 0.2
        return F.cross_entropy(4 * logits, y)


class AdditiveMargin(Embedder):
    """One-hot times (cosine - margin), one_hot of functional."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        cosine = F.linear(self(x), F.normalize(self.weight))
        margin = F.one_hot(y, K) * 0.2
        return F.cross_entropy(4 * (cosine - margin), y)


class Centers(Embedder):
    """Cross-entropy and the distance to the learned centre of the own class."""

    def __init__(self) -> None:
        super().__init__()
        self.centers, self.fc = nn.Parameter(torch.randn(K, D)), nn.Linear(D, K)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        features = self(x)
        center_loss = (features - self.centers[y]).pow(2).sum(dim=1).mean() / 2
        return F.cross_entropy(self.fc(features), y) + 0.1 * center_loss


class CenterDistances(Centers):
    """Distances to all centres, masked by labels.eq(classes)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        features, n = self(x), x.size(0)
        distmat = torch.cdist(features, self.centers).pow(2)
        mask = labels.unsqueeze(1).expand(n, K).eq(torch.arange(K).long().expand(n, K))
        center_loss = (distmat * mask.to(distmat.dtype)).clamp(min=1e-12, max=1e12).sum() / n
        return F.cross_entropy(self.fc(features), labels) + 0.1 * center_loss


class ProxyNCA(Embedder):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        distances = torch.cdist(self(x), F.normalize(self.weight)) ** 2
        positive = F.one_hot(y, K).bool()
        to_own = distances[positive]
        to_others = torch.logsumexp((-distances).masked_fill(positive, float("-inf")), dim=1)
        return (to_own + to_others).mean()


class SupCon(Embedder):
    """Khosla et al., 2020: rows attract each other where their labels agree."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        features = self(x)
        similarity = features @ features.T / 0.5
        others = ~torch.eye(len(y), dtype=torch.bool)
        positive = (y[:, None] == y[None, :]) & others
        log_prob = similarity - torch.logsumexp(similarity.masked_fill(~others, float("-inf")), dim=1, keepdim=True)
        mean = (log_prob * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
        return -mean.mean()


class BatchHardTriplet(Embedder):
    """Hermans et al., 2017."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        distances = torch.cdist(features := self(x), features)
        same = y.unsqueeze(0).eq(y.unsqueeze(1)).to(distances.dtype)
        furthest = (distances * same).max(dim=1)[0]
        nearest = (distances + 10 * same).min(dim=1)[0]
        return F.relu(furthest - nearest + 0.3).mean()


class Triplets(Embedder):
    """Anchor, positive and negative come with the batch: three forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.TripletMarginLoss(margin=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        anchor, positive, negative = batch
        return self.loss(self(anchor), self(positive), self(negative))


class SimCLR(Embedder):
    """Two views along the batch dimension; the targets are made of row numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (first, second), _ = batch
        z = self(torch.cat([first, second], dim=0))
        n = len(first)
        similarity = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
        target = (torch.arange(2 * n) + n) % (2 * n)
        return F.cross_entropy(similarity, target)


class CLIP(Embedder):
    """Two towers; row i belongs to row i."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, D)
        self.logit_scale = nn.Parameter(torch.tensor(0.7))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        image, text = batch["image"], batch["text"]
        logits = self.logit_scale.exp() * self(image) @ F.normalize(self.text(text)).T
        target = torch.arange(len(logits), device=self.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class SamePair(Module):
    """Two inputs through one encoder, then one judgement of the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.merge = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a, b, same = batch
        difference = torch.abs(self.encoder(a) - self.encoder(b))
        logits = self.head(self.merge(difference)).flatten()
        return F.binary_cross_entropy_with_logits(logits, same.type_as(logits))


class ContrastivePair(SamePair):
    """Hadsell et al., 2006: the distance of two embeddings."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a, b, same = batch
        distance = F.pairwise_distance(self.merge(self.encoder(a)), self.merge(self.encoder(b)))
        return torch.mean(same * distance**2 + (1 - same) * torch.clamp(1 - distance, min=0) ** 2)


def _batch() -> Any:
    return reals(4), classes(K)


def _pairs() -> Any:
    return reals(4), reals(4, seed=3), classes(2, seed=5)


def _entry(name: str, style: str, module: Any, batch: Any = _batch, of: Any = None, **more: Any) -> Entry:
    return Entry(
        name,
        "metric learning",
        style,
        seeded(module),
        batch,
        of or targets(1),
        more.pop("layers", ("encoder",)),
        **more,
    )


ENTRIES = [
    _entry("ArcFace", "F.cross_entropy; labels choose the margin in the head, scatter_", ArcFace),
    _entry("CosFace", "F.cross_entropy after logits[range(N), y] -= m", CosFace),
    _entry("AdditiveMargin", "F.cross_entropy(s * (cos - m * one_hot), y)", AdditiveMargin),
    _entry("Centers", "F.cross_entropy + distance to centers[y]", Centers),
    _entry("CenterDistances", "F.cross_entropy + distances masked by labels.eq", CenterDistances),
    _entry("ProxyNCA", "distances[one_hot] and masked_fill", ProxyNCA),
    _entry("SupCon", "rows are compared by y[:, None] == y[None, :]", SupCon),
    _entry(
        "BatchHardTriplet",
        "rows are compared by y.unsqueeze(0).eq(y.unsqueeze(1))",
        BatchHardTriplet,
    ),
    _entry(
        "Triplets",
        "nn.TripletMarginLoss of three forward passes",
        Triplets,
        lambda: (reals(4), reals(4, seed=3), reals(4, seed=4)),
        targets(1, 2),
        refused=SEVERAL_PASSES,
    ),
    _entry(
        "SimCLR",
        "F.cross_entropy on row numbers, two views in one batch",
        SimCLR,
        lambda: ((reals(4), reals(4, seed=3)), classes(K)),
        refused=f"{ROWS} rows",
    ),
    _entry(
        "CLIP",
        "F.cross_entropy on arange(N), two towers",
        CLIP,
        lambda: {"image": reals(4), "text": reals(3, seed=3)},
        targets("text"),
        refused="a path from the batch to the loss through 'text' leads around it",
        options={"strict": True},
    ),
    _entry("SamePair", "BCE on the merged pair", SamePair, _pairs, targets(2), layers=("merge",)),
    _entry(
        "ContrastivePair", "distance of two forward passes", ContrastivePair, _pairs, targets(2), refused=SEVERAL_PASSES
    ),
]
