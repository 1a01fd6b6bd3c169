"""Image classification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Accuracy, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zoo.entry import NOT_OF_THE_BATCH, Entry, Module, classes, reals, seeded, targets

K = 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class ResNet(Module):
    def __init__(self, num_classes: int = K) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1, self.layer2 = Block(4), Block(4)
        self.fc = nn.Linear(4, num_classes)
        self.criterion = nn.CrossEntropyLoss()

    def features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = self.criterion(self(images), labels)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss


class FunctionalMLP(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, K)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y)
        acc = (logits.argmax(dim=1) == y).float().mean()
        self.log_dict({"train/loss": loss, "train/acc": acc}, prog_bar=True)
        return loss


class NegativeLogLikelihood(Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return F.log_softmax(self.fc(torch.flatten(x, 1)), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        data, target = batch
        output = self(data)
        loss = F.nll_loss(output, target)
        pred = output.argmax(dim=1, keepdim=True)
        self.log("correct", pred.eq(target.view_as(pred)).sum().item())
        return loss


class SmoothedAndWeighted(ResNet):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.1)


class WithMetrics(ResNet):
    def __init__(self) -> None:
        super().__init__()
        self.train_acc = Accuracy(task="multiclass", num_classes=K)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = self.criterion(logits, y)
        preds = torch.argmax(logits, dim=1)
        self.train_acc(preds, y)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss


class SharedStep(ResNet):
    """A step shared by the phases, which returns predictions for the end of the batch."""

    def __init__(self) -> None:
        super().__init__()
        metrics = MetricCollection([MulticlassAccuracy(K), MulticlassF1Score(K)])
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")

    def shared_step(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "preds": logits.detach(), "target": y}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.shared_step(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict(self.train_metrics(outputs["preds"], outputs["target"]))


class VisionTransformer(nn.Module):
    """The interface of timm: forward_features, forward_head, forward."""

    def __init__(self, num_classes: int, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, dim) * 0.02)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(
            *[nn.TransformerEncoderLayer(dim, 2, 8, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (N, D, H, W) -> (N, H W, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class LabelSmoothingCrossEntropy(nn.Module):
    """Label smoothing as timm has it."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing, self.confidence = smoothing, 1.0 - smoothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logprobs = F.log_softmax(x, dim=-1)
        nll_loss = -logprobs.gather(dim=-1, index=target.unsqueeze(1))
        nll_loss = nll_loss.squeeze(1)
        smooth_loss = -logprobs.mean(dim=-1)
        return (self.confidence * nll_loss + self.smoothing * smooth_loss).mean()


class TimmStyle(Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = VisionTransformer(K)
        self.loss_fn = LabelSmoothingCrossEntropy(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        features = self.model.forward_features(x)
        return self.loss_fn(self.model.forward_head(features), y)


class FineAndCoarse(ResNet):
    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, (fine, coarse) = batch
        h = self.features(x)
        loss_fine, loss_coarse = self.criterion(self.fc(h), fine), self.criterion(self.coarse(h), coarse)
        self.log_dict({"fine": loss_fine.detach(), "coarse": loss_coarse.detach()})
        return loss_fine + 0.5 * loss_coarse


class AuxiliaryHead(ResNet):
    """As in GoogLeNet: a second classifier on an earlier stage while training."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4, K)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        early = self.layer1(self.stem(x))
        logits, aux = self.fc(self.layer2(early).mean(dim=(2, 3))), self.aux(early.mean(dim=(2, 3)))
        return F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(aux, y)


class SoftLabels(ResNet):
    """Annotators' votes, as probabilities."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, votes = batch
        logits = self(x)
        self.log("agreement", (logits.argmax(1) == votes.argmax(1)).float().mean())
        return self.criterion(logits, votes)


class NestedLists(ResNet):
    """A batch as a collate function that keeps lists makes it: [[image, metadata], [label]]."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = nn.Linear(2, 4)
        self.trunk = nn.Sequential(nn.Linear(8, 4), nn.ReLU())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (image, metadata), (label,) = batch
        hidden = self.trunk(torch.cat([self.features(image), self.metadata(metadata)], dim=1))
        return F.cross_entropy(self.fc(hidden), label)


class RotationPretext(ResNet):
    """Self-supervision: the targets are drawn in the step."""

    def __init__(self) -> None:
        super().__init__(num_classes=4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        rotations = torch.randint(0, 4, (len(x),), device=self.device)
        x = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, rotations, strict=True)])
        return F.cross_entropy(self(x), rotations)


def _batch() -> Any:
    return reals(3, 4, 4), classes(K)


def _entry(name: str, style: str, module: Any, layers: tuple[str, ...], batch: Any = _batch, **more: Any) -> Entry:
    return Entry(name, "images", style, seeded(module), batch, targets(1), layers, **more)


ENTRIES = [
    _entry("ResNet", "nn.CrossEntropyLoss as an attribute", ResNet, ("input", "layer1", "layer2")),
    _entry("FunctionalMLP", "cross_entropy imported by name", FunctionalMLP, ("input", "layers.2", "layers.5")),
    _entry("SmoothedAndWeighted", "CrossEntropyLoss, class weights and smoothing", SmoothedAndWeighted, ("layer1",)),
    _entry("WithMetrics", "CrossEntropyLoss beside torchmetrics in the step", WithMetrics, ("layer1",)),
    _entry("SharedStep", "F.cross_entropy in a shared step that returns a dict", SharedStep, ("layer1",)),
    _entry(
        "NegativeLogLikelihood", "log_softmax in forward, F.nll_loss in the step", NegativeLogLikelihood, ("conv1",)
    ),
    _entry(
        "TimmStyle", "label smoothing of timm: gather and mean of log-probabilities", TimmStyle, ("model.pos_drop",)
    ),
    _entry(
        "FineAndCoarse",
        "sum of two CrossEntropyLoss on two heads",
        FineAndCoarse,
        ("layer1",),
        lambda: (reals(3, 4, 4), [classes(K), classes(2, seed=4)]),
    ),
    _entry("AuxiliaryHead", "F.cross_entropy of the head and of an earlier one", AuxiliaryHead, ("stem", "layer1")),
    _entry(
        "SoftLabels",
        "CrossEntropyLoss on class probabilities from the batch",
        SoftLabels,
        ("layer1",),
        lambda: (reals(3, 4, 4), reals(K, seed=3).softmax(dim=1)),
    ),
    _entry(
        "NestedLists",
        "F.cross_entropy, batch of nested lists",
        NestedLists,
        ("trunk",),
        lambda: [[reals(3, 4, 4), reals(2, seed=3)], [classes(K)]],
    ),
    _entry(
        "RotationPretext",
        "F.cross_entropy on targets drawn in the step",
        RotationPretext,
        ("layer1",),
        refused=NOT_OF_THE_BATCH,
    ),
]
