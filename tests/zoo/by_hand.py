"""Classification losses that projects write themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Module, classes, reals, seeded, targets

K = 3


class Classifier(Module):
    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, K)
        self.criterion = criterion

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.encoder(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = self.criterion(logits, y)
        if not torch.isfinite(loss):
            return None
        self.log_dict({"loss": loss, "acc": (logits.argmax(dim=-1) == y).sum() / len(y)})
        return loss


class FocalOfCrossEntropy(nn.Module):
    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        ce_loss = F.cross_entropy(inputs, targets, reduction="none")
        pt = torch.exp(-ce_loss)
        return ((1 - pt) ** self.gamma * ce_loss).mean()


class FocalByGather(nn.Module):
    """With a weight for each class, and probabilities cut off the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor([0.2, 0.5, 0.3]))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        target = target.view(-1, 1)
        logpt = F.log_softmax(input, dim=1).gather(1, target).view(-1)
        pt = logpt.detach().exp()
        logpt = logpt * self.alpha.gather(0, target.view(-1))
        return (-1 * (1 - pt) ** 2 * logpt).mean()


def focal_by_one_hot(logits: Tensor, y: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    t = F.one_hot(y, logits.shape[-1]).type_as(logits)
    p = torch.sigmoid(logits)
    ce_loss = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    alpha_t = alpha * t + (1 - alpha) * (1 - t)
    return (alpha_t * ce_loss * ((1 - p_t) ** gamma)).sum(dim=1).mean()


def nll_by_index(logits: Tensor, y: Tensor) -> Tensor:
    log_probs = torch.log_softmax(logits, dim=1)
    return -log_probs[range(len(y)), y].mean()


def nll_by_loop(logits: Tensor, y: Tensor) -> Tensor:
    log_probs = torch.log_softmax(logits, dim=1)
    loss = 0.0
    for i in range(len(y)):
        loss = loss - log_probs[i, y[i]]
    return loss / len(y)


def nll_by_scatter(logits: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    one_hot.scatter_(1, y.unsqueeze(1), 1.0)
    return torch.mean(torch.sum(-one_hot * F.log_softmax(logits, dim=1), dim=1))


def nll_by_eye(logits: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.eye(K, dtype=logits.dtype)[y]
    return -torch.einsum("nk,nk->n", one_hot, logits.log_softmax(-1)).mean()


def nll_by_logsumexp(logits: Tensor, y: Tensor) -> Tensor:
    picked = torch.take_along_dim(logits, y[:, None], dim=1)[:, 0]
    return (torch.logsumexp(logits, dim=1) - picked).mean()


def nll_by_class(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over the classes of the mean over their rows."""
    losses = []
    for k in range(K):
        rows = y == k
        if rows.any():
            losses.append(F.cross_entropy(logits[rows], y[rows]))
    return torch.stack(losses).mean()


def balanced(logits: Tensor, y: Tensor) -> Tensor:
    counts = torch.bincount(y, minlength=K).to(logits.dtype)
    return F.cross_entropy(logits, y, weight=len(y) / (K * counts.clamp(min=1)))


class SmoothingByDivergence(nn.Module):
    """Label smoothing as in the Annotated Transformer."""

    def __init__(self, size: int = K, smoothing: float = 0.1) -> None:
        super().__init__()
        self.criterion = nn.KLDivLoss(reduction="sum")
        self.confidence, self.smoothing, self.size = 1.0 - smoothing, smoothing, size

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = x.log_softmax(dim=-1)
        true_dist = x.data.clone()
        true_dist.fill_(self.smoothing / (self.size - 1))
        true_dist.scatter_(1, target.data.unsqueeze(1), self.confidence)
        return self.criterion(x, true_dist.clone().detach()) / len(x)


class LDAM(nn.Module):
    """Cao et al., 2019: a margin for each class, subtracted where a byte mask says so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("margins", torch.tensor([[0.5, 0.3, 0.1]]))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        index = torch.zeros_like(x, dtype=torch.uint8)
        index.scatter_(1, target.data.view(-1, 1), 1)
        batch_m = torch.matmul(self.margins, index.to(x.dtype).transpose(0, 1)).view((-1, 1))
        output = torch.where(index.bool(), x - batch_m, x)
        return F.cross_entropy(3 * output, target)


class Symmetric(nn.Module):
    """Wang et al., 2019: cross-entropy and the reverse one."""

    def forward(self, pred: Tensor, labels: Tensor) -> Tensor:
        ce = F.cross_entropy(pred, labels)
        pred = torch.clamp(F.softmax(pred, dim=1), min=1e-7, max=1.0)
        one_hot = torch.clamp(F.one_hot(labels, K).to(pred.dtype), min=1e-4, max=1.0)
        return 0.1 * ce - (pred * torch.log(one_hot)).sum(dim=1).mean()


def generalized(logits: Tensor, y: Tensor, q: float = 0.7) -> Tensor:
    """Zhang and Sabuncu, 2018."""
    p = F.softmax(logits, dim=1)
    return ((1 - torch.gather(p, 1, torch.unsqueeze(y, 1)) ** q) / q).mean()


def poly1(logits: Tensor, y: Tensor, epsilon: float = 1.0) -> Tensor:
    pt = (F.one_hot(y, K) * F.softmax(logits, dim=1)).sum(dim=-1)
    return (F.cross_entropy(logits, y, reduction="none") + epsilon * (1 - pt)).mean()


def bootstrapped(logits: Tensor, y: Tensor, beta: float = 0.8) -> Tensor:
    """Reed et al., 2014: the network's own opinion is a part of the target."""
    target = beta * F.one_hot(y, K) + (1 - beta) * F.softmax(logits, dim=1).detach()
    return -(target * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def hardest(logits: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, y, reduction="none")
    return losses.topk(k=len(losses) // 2)[0].mean()


def flooded(logits: Tensor, y: Tensor, level: float = 1.045) -> Tensor:
    """Ishida et al., 2020. The level is between the losses on own and on partners' targets."""
    return (F.cross_entropy(logits, y) - level).abs() + level


def brier(logits: Tensor, y: Tensor) -> Tensor:
    return ((logits.softmax(dim=1) - F.one_hot(y, K)) ** 2).sum(dim=1).mean()


def earth_mover(logits: Tensor, y: Tensor) -> Tensor:
    """Hou et al., 2016, squared: classes in an order."""
    cdf = torch.cumsum(logits.softmax(dim=1), dim=1)
    return torch.square(cdf - torch.cumsum(F.one_hot(y, K), dim=1)).sum(dim=1).mean()


def soft_f1(logits: Tensor, y: Tensor) -> Tensor:
    p, t = logits.softmax(dim=1), F.one_hot(y, K).to(logits.dtype)
    tp, fp, fn = (p * t).sum(0), (p * (1 - t)).sum(0), ((1 - p) * t).sum(0)
    return 1 - (2 * tp / (2 * tp + fp + fn + 1e-8)).mean()


class ExpectedCost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cost", torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [5.0, 1.0, 0.0]]))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return (self.cost[y] * logits.softmax(dim=1)).sum(dim=1).mean()


def crammer_singer(logits: Tensor, y: Tensor) -> Tensor:
    rows = torch.arange(len(y), device=y.device)
    margins = torch.clamp(logits - logits[rows, y][:, None] + 1, min=0)
    margins[rows, y] = 0
    return margins.sum(dim=1).mean()


class ByList(nn.Module):
    """Targets leave torch."""

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        log_probs = logits.log_softmax(dim=1)
        return -torch.stack([log_probs[i, k] for i, k in enumerate(y.tolist())]).mean()


class ByNumpy(nn.Module):
    """Targets pass through numpy."""

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        smooth = torch.from_numpy(y.cpu().numpy() * 0.5 + 0.25).to(logits)
        return F.mse_loss(logits.softmax(dim=1) @ torch.arange(K).to(logits), smooth)


class BestMatch(nn.Module):
    """A set of K values for each row: the assignment of least cost, found outside of torch."""

    def forward(self, values: Tensor, targets: Tensor) -> Tensor:
        total = 0.0
        for row, wanted in zip(values, targets, strict=True):
            cost = (row[:, None] - wanted[None, :]) ** 2
            costs = cost.tolist()
            best = min(itertools.permutations(range(K)), key=lambda p: sum(costs[i][j] for i, j in enumerate(p)))
            total = total + cost[range(K), best].sum()
        return total / len(values)


class SetClassifier(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self(batch[0]), batch[1])


def _batch() -> Any:
    return reals(4), classes(K)


def _entry(name: str, style: str, criterion: Any, make: Any = Classifier, batch: Any = _batch, **more: Any) -> Entry:
    module = seeded(lambda: make(criterion() if isinstance(criterion, type) else criterion))
    return Entry(name, "losses by hand", style, module, batch, targets(1), ("encoder",), **more)


NAMED = {"options": {"loss": "criterion"}}
ENTRIES = [
    _entry("FocalOfCrossEntropy", "focal: (1 - exp(-ce)) ** gamma * ce, reduction none", FocalOfCrossEntropy),
    _entry("FocalOfCrossEntropy, named", "the same with loss='criterion'", FocalOfCrossEntropy, **NAMED),
    _entry("FocalByGather", "focal: gather, a weight for each class", FocalByGather),
    _entry("focal_by_one_hot", "focal: one_hot and BCE with logits", focal_by_one_hot),
    _entry("nll_by_index", "log_probs[range(N), y]", nll_by_index),
    _entry("nll_by_loop", "a loop over log_probs[i, y[i]]", nll_by_loop),
    _entry("nll_by_scatter", "one-hot by scatter_ on a zeros tensor", nll_by_scatter),
    _entry("nll_by_eye", "one-hot by eye(K)[y], einsum", nll_by_eye),
    _entry("nll_by_logsumexp", "logsumexp - take_along_dim", nll_by_logsumexp),
    _entry("nll_by_class", "mean over classes of F.cross_entropy on logits[y == k]", nll_by_class),
    _entry("balanced", "F.cross_entropy, weights from the batch's bincount", balanced),
    _entry("SmoothingByDivergence", "KLDivLoss on a distribution made by scatter_", SmoothingByDivergence),
    _entry("LDAM", "F.cross_entropy after torch.where on a scattered mask", LDAM),
    _entry("Symmetric", "F.cross_entropy + reverse, log of a clamped one-hot", Symmetric),
    _entry("generalized", "(1 - p.gather(y) ** q) / q", generalized),
    _entry("poly1", "F.cross_entropy + one_hot times softmax", poly1),
    _entry("bootstrapped", "one_hot blended with the network's softmax", bootstrapped),
    _entry("hardest", "topk of F.cross_entropy without reduction", hardest),
    _entry("flooded", "|F.cross_entropy - b| + b", flooded),
    _entry("brier", "squared distance of softmax and one_hot", brier),
    _entry("brier, named", "the same, a function, with loss='criterion'", brier, **NAMED),
    _entry("earth_mover", "squared distance of cumulated softmax and one_hot", earth_mover),
    _entry("soft_f1", "F1 of soft counts over the batch", soft_f1),
    _entry("ExpectedCost", "rows of a cost matrix, cost[y]", ExpectedCost),
    _entry("crammer_singer", "hinge by index, margins[rows, y] = 0", crammer_singer),
    _entry("MultiMargin", "nn.MultiMarginLoss", nn.MultiMarginLoss),
    _entry("ByList", "a loop over y.tolist()", ByList),
    _entry("ByList, named", "the same with loss='criterion'", ByList, **NAMED),
    _entry("ByNumpy", "targets through numpy", ByNumpy),
    _entry("ByNumpy, named", "the same with loss='criterion'", ByNumpy, **NAMED),
    _entry(
        "BestMatch, named",
        "assignment of least cost by .tolist(), loss='criterion'",
        BestMatch,
        SetClassifier,
        lambda: (reals(4), classes(K, K)),
        **NAMED,
    ),
]
