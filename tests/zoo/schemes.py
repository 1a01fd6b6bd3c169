"""Training schemes: several tasks, teachers, manual optimization, steps that do more than one forward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import SEVERAL_PASSES, Entry, Module, classes, everything, reals, seeded, targets

K = 3


class Network(Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.encoder(x)))


class UncertaintyWeighted(Network):
    """Kendall et al., 2018: a learned log variance weighs each task of a dict of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"depth": nn.Linear(8, 1), "label": nn.Linear(8, K), "tags": nn.Linear(8, 4)})
        self.log_var = nn.ParameterDict({name: nn.Parameter(torch.tensor(0.3)) for name in self.heads})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden, target = self.hidden(self.encoder(batch["x"])), batch["target"]
        losses = {
            "depth": F.mse_loss(self.heads["depth"](hidden).squeeze(-1), target["depth"]),
            "label": F.cross_entropy(self.heads["label"](hidden), target["label"]),
            "tags": F.binary_cross_entropy_with_logits(self.heads["tags"](hidden), target["tags"]),
        }
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(hidden))
        return sum(torch.exp(-self.log_var[name]) * loss + self.log_var[name] for name, loss in losses.items())


class PartlyLabelled(Network):
    """NaN where a value is not known."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        known = ~torch.isnan(y)
        return F.mse_loss(self(x)[known], y[known])


class DeepSupervision(Network):
    """A list of outputs, a weight for each."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion, self.early = nn.CrossEntropyLoss(), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Any:
        early = self.encoder(x)
        return [self.early(early), self.head(self.hidden(early))]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        weights = [0.3, 1.0]
        return sum(w * self.criterion(output, y) for w, output in zip(weights, self(x), strict=True))


class Penalized(Network):
    """Terms without targets: weight decay, and confidence (Pereyra et al., 2017)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        decay = sum(p.pow(2).sum() for p in self.parameters())
        return F.cross_entropy(logits, y) - 0.1 * entropy + 1e-3 * decay


class Distillation(Network):
    """Hinton et al., 2015: cross-entropy and the divergence from a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, K)).requires_grad_(False)
        self.kl, self.T = nn.KLDivLoss(reduction="batchmean"), 2.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        with torch.no_grad():
            teacher_logits = self.teacher(x)
        logits = self(x)
        soft = self.kl(F.log_softmax(logits / self.T, dim=1), F.softmax(teacher_logits / self.T, dim=1))
        return 0.5 * F.cross_entropy(logits, y) + 0.5 * self.T**2 * soft


class StoredTeacher(Network):
    """The teacher's probabilities come with the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, probabilities = batch
        return F.kl_div(self(x).log_softmax(dim=-1), probabilities, reduction="batchmean")


class MeanTeacher(Network):
    """Tarvainen and Valpola, 2017: the average of the student's weights is the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = nn.ModuleList([copy.deepcopy(part) for part in (self.encoder, self.hidden, self.head)])
        self.ema.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits, teacher = self(x), x
        with torch.no_grad():
            for part in self.ema:
                teacher = part(teacher)
        return F.cross_entropy(logits, y) + 10 * F.mse_loss(logits.softmax(1), teacher.softmax(1))

    def on_train_batch_end(self, *_: Any) -> None:
        for student, mean in zip((self.encoder, self.hidden, self.head), self.ema, strict=True):
            for p, q in zip(student.parameters(), mean.parameters(), strict=True):
                q.mul_(0.99).add_(p.detach(), alpha=0.01)


class TwoOptimizers(Network):
    """Manual optimization: one for the trunk, one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        trunk = [*self.encoder.parameters(), *self.hidden.parameters()]
        return torch.optim.SGD(trunk, lr=0.1), torch.optim.Adam(self.head.parameters(), lr=1e-3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("loss", loss)


class TwoBackwards(TwoOptimizers):
    """Manual optimization: one loss after the other through the same graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        trunk, head = self.optimizers()
        logits = self(x)
        head.zero_grad()
        trunk.zero_grad()
        self.manual_backward(F.cross_entropy(logits, y), retain_graph=True)
        self.manual_backward(0.1 * F.multi_margin_loss(logits, y))
        trunk.step()
        head.step()


class ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.3 * grad


class DomainAdversarial(TwoOptimizers):
    """Ganin et al., 2016: the domain is a target as well."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(8, 1)

    def configure_optimizers(self) -> Any:
        return [*super().configure_optimizers(), torch.optim.SGD(self.domain.parameters(), lr=0.1)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, domain = batch
        hidden = self.hidden(self.encoder(x))
        guess = self.domain(ReverseGradient.apply(hidden)).squeeze(1)
        loss = F.cross_entropy(self.head(hidden), y) + F.binary_cross_entropy_with_logits(guess, domain.type_as(guess))
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class OwnMixup(Network):
    """Mixup of the inputs that the project does itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        lam, index = 0.7, torch.randperm(x.size(0))
        mixed_x, y_a, y_b = lam * x + (1 - lam) * x[index], y, y[index]
        logits = self(mixed_x)
        return lam * F.cross_entropy(logits, y_a) + (1 - lam) * F.cross_entropy(logits, y_b)


class RDrop(Network):
    """Liang et al., 2021: two forward passes that should agree."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        first, second = self(x), self(x)
        kl = F.kl_div(first.log_softmax(1), second.softmax(1), reduction="batchmean")
        return F.cross_entropy(first, y) + F.cross_entropy(second, y) + kl


class FastGradientSign(Network):
    """Goodfellow et al., 2015: a first pass finds the attack, a second trains on it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(self(x), y), x)
        return F.cross_entropy(self((x + 0.1 * grad.sign()).detach()), y)


class PseudoLabels(Network):
    """Rows without a label (-1) take the network's own, where it is sure."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        sure, guess = logits.detach().softmax(dim=1).max(dim=1)
        target = torch.where((y < 0) & (sure > 0.3), guess, y)
        return F.cross_entropy(logits, target, ignore_index=-1)


def _batch() -> Any:
    return reals(4), classes(K)


def _tasks() -> Any:
    return {
        "x": reals(4),
        "target": {"depth": reals(seed=3), "label": classes(K), "tags": classes(2, 4, seed=4).double()},
    }


def _partly() -> Any:
    return reals(4), reals(K, seed=3).masked_fill(reals(K, seed=5) > 0.5, float("nan"))


def _entry(domain: str, name: str, style: str, module: Any, batch: Any = _batch, of: Any = None, **more: Any) -> Entry:
    layers = more.pop("layers", ("encoder",))
    return Entry(name, domain, style, seeded(module), batch, of or targets(1), layers, **more)


ENTRIES = [
    _entry(
        "several tasks",
        "UncertaintyWeighted",
        "MSE, CE and BCE of a dict of targets, learned weights",
        UncertaintyWeighted,
        _tasks,
        targets("target"),
    ),
    _entry("several tasks", "PartlyLabelled", "F.mse_loss on pred[known], y[known]", PartlyLabelled, _partly),
    _entry("several tasks", "DeepSupervision", "sum of CrossEntropyLoss over a list of outputs", DeepSupervision),
    _entry("regularization", "Penalized", "F.cross_entropy, entropy and weight penalties", Penalized),
    _entry(
        "distillation",
        "Distillation",
        "F.cross_entropy + KLDivLoss from a teacher under no_grad",
        Distillation,
        of=everything,
        moves_inputs=True,
    ),
    _entry(
        "distillation",
        "StoredTeacher",
        "F.kl_div on probabilities of the batch",
        StoredTeacher,
        lambda: (reals(4), reals(K, seed=3).softmax(dim=1)),
    ),
    _entry(
        "semi-supervised",
        "MeanTeacher",
        "F.cross_entropy + MSE to an averaged teacher",
        MeanTeacher,
        of=everything,
        moves_inputs=True,
    ),
    _entry(
        "semi-supervised",
        "PseudoLabels",
        "F.cross_entropy on labels or, without, on the own guess",
        PseudoLabels,
        lambda: (reals(4), classes(K, start=-1)),
    ),
    _entry("manual optimization", "TwoOptimizers", "F.cross_entropy, two optimizers", TwoOptimizers),
    _entry("manual optimization", "TwoBackwards", "F.cross_entropy, then F.multi_margin_loss", TwoBackwards),
    _entry(
        "manual optimization",
        "DomainAdversarial",
        "F.cross_entropy + BCE of the domain, gradient reversal",
        DomainAdversarial,
        lambda: (reals(4), classes(K), classes(2, seed=5)),
        targets(1, 2),
    ),
    _entry(
        "augmentation",
        "OwnMixup",
        "lam * CE(y) + (1 - lam) * CE(y[index]) by the project itself",
        OwnMixup,
        refused="the step shuffles, samples or mixes rows itself",
    ),
    _entry("augmentation", "OwnMixup, at the input", "the same", OwnMixup, layers=("input",)),
    _entry("two passes", "RDrop", "F.cross_entropy of two passes + their divergence", RDrop, refused=SEVERAL_PASSES),
    _entry(
        "two passes", "FastGradientSign", "F.cross_entropy after an attack", FastGradientSign, refused=SEVERAL_PASSES
    ),
]
