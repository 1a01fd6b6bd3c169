"""The small data of ``scripts/evidence.py``: rows of numbers, a time series, sentences; plain LightningModules.

Each seed draws a split, first weights and an order of its own, which all methods share.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from evidence_images import calibration_error
from sklearn import datasets
from torch import Tensor, nn

from mm_lightning import ManifoldMixupCallback
from mm_lightning.mixup import Until

# Training inputs and targets, test inputs and targets.
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """What a run does against overfitting.

    Attributes:
        mixup: Arguments of the callback; None runs without. ``"first"`` stands for the task's first hidden layer.
        smoothing: Of labels, in [0, 1).
        weight_decay: Of AdamW, per unit of the learning rate; 0 is Adam.
        share: Of the task's epochs.
    """

    mixup: dict[str, Any] | None = None
    smoothing: float = 0.0
    weight_decay: float = 0.0
    share: float = 1.0


METHODS = {
    "none": Method(),
    "label smoothing": Method(smoothing=0.1),
    "weight decay": Method(weight_decay=1.0),
    "a quarter of the epochs": Method(share=0.25),
    "input, alpha 1": Method({"layers": "input", "alpha": 1.0}),
    "input, alpha 2": Method({"layers": "input", "alpha": 2.0}),
    "first hidden layer, alpha 2": Method({"layers": "first", "alpha": 2.0}),
    "auto, alpha 0.2": Method({"alpha": 0.2}),
    "auto, alpha 1": Method({"alpha": 1.0}),
    "auto, alpha 2": Method({}),
    "auto, alpha 1, until 80 %": Method({"alpha": 1.0, "schedule": Until(0.8)}),
    "auto, alpha 2, until 80 %": Method({"schedule": Until(0.8)}),
}


@dataclass(frozen=True)
class Task:
    """Data, and a network for them.

    Attributes:
        load: Draws the split of a seed.
        network: Makes the network of a split.
        first: Name of its first hidden layer.
        epochs: Of training.
        batch: Rows per step; a last batch of fewer is left out.
        is_number: Whether a number is learned, by squared error; else classes.
        methods: Those that fit it.
    """

    load: Callable[[int], Split]
    network: Callable[[Split], nn.Module]
    first: str
    epochs: int = 60
    batch: int = 32
    is_number: bool = False
    methods: tuple[str, ...] = tuple(METHODS)


class MLP(nn.Sequential):
    """Three hidden layers of 128 units."""

    def __init__(self, inputs: int, outputs: int) -> None:
        widths = [inputs, 128, 128, 128]
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        super().__init__(*hidden, nn.Linear(128, outputs))


class SeriesCNN(nn.Sequential):
    """Three convolutions along time, each followed by pooling over pairs; then the mean."""

    def __init__(self, classes: int) -> None:
        channels = [1, 16, 32, 32]
        stages = [
            nn.Sequential(nn.Conv1d(a, b, 7, padding=3), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(2))
            for a, b in pairwise(channels)
        ]
        super().__init__(*stages, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class SentenceTransformer(nn.Module):
    """Embeddings with learned places, a layer of attention, the mean over the words."""

    def __init__(self, words: int, length: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.mean = _MeanOfWords()
        self.head = nn.Linear(width, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (N, K) of the numbers of words (N, T), where 0 is no word."""
        padding = words == 0
        hidden = self.layer(self.embedding(words) + self.places, src_key_padding_mask=padding)
        return self.head(self.mean(hidden, padding_mask=padding))


class _MeanOfWords(nn.Module):
    def forward(self, hidden: Tensor, padding_mask: Tensor) -> Tensor:
        weight = (~padding_mask).to(hidden.dtype)[:, :, None]
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


class Learner(pl.LightningModule):
    """A network, its loss, and Adam with a learning rate of 1e-3."""

    def __init__(self, network: nn.Module, method: Method) -> None:
        super().__init__()
        self.network, self.method = network, method

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        outputs, targets = self.network(batch[0]), batch[1]
        if targets.is_floating_point():
            return F.mse_loss(outputs[:, 0], targets)
        return F.cross_entropy(outputs, targets, label_smoothing=self.method.smoothing)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, which without a weight decay is Adam."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=self.method.weight_decay)


class Batches:
    """The training rows in a new order in every epoch."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch: int, seed: int) -> None:
        self.inputs, self.targets, self.batch = inputs, targets, batch
        self.rng = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.inputs) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.rng)
        for i in range(len(self)):
            rows = order[i * self.batch : (i + 1) * self.batch]
            yield self.inputs[rows], self.targets[rows]


def score(task: Task, method: Method, seed: int) -> dict[str, float]:
    """Train and test: accuracy, NLL and ECE of classes; squared error and the variance it explains of numbers."""
    split = task.load(seed)
    inputs, targets, test_inputs, test_targets = split
    pl.seed_everything(seed)
    learner = Learner(task.network(split), method)
    callbacks: list[pl.Callback] = [] if method.mixup is None else [mixup(task, method.mixup, seed)]
    trainer = pl.Trainer(
        max_epochs=max(1, round(method.share * task.epochs)),
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(learner, Batches(inputs, targets, task.batch, seed))
    with torch.no_grad():
        outputs = learner.eval().network(test_inputs)
    if task.is_number:
        error = float(F.mse_loss(outputs[:, 0], test_targets))
        return {"mse": error, "r2": 1 - error / float(test_targets.var(unbiased=False))}
    return {
        "acc": float((outputs.argmax(dim=1) == test_targets).float().mean()),
        "nll": float(F.cross_entropy(outputs, test_targets)),
        "ece": calibration_error(outputs, test_targets),
    }


def mixup(task: Task, settings: dict[str, Any], seed: int) -> ManifoldMixupCallback:
    """The callback of a method: what it does not set is the callback's own default."""
    layers = {"layers": f"network.{task.first}"} if settings.get("layers") == "first" else {}
    return ManifoldMixupCallback(**{"schedule": None, **settings, **layers}, seed=seed)


def rows_of_sklearn(load: Callable[[], Any], seed: int, most: int = 300) -> Split:
    """Half of the rows, at most ``most``, to train on, the others to test; standardised by the training rows.

    Columns that are all the same in these, such as the corners of digits, are left out.
    """
    found = load()
    inputs, targets = found.data.astype(np.float32), found.target
    order = np.random.default_rng(seed).permutation(len(inputs))
    train, test = np.split(order, [min(len(order) // 2, most)])
    inputs = inputs[:, inputs[train].std(axis=0) > 0]
    inputs = (inputs - inputs[train].mean(axis=0)) / inputs[train].std(axis=0)
    if targets.dtype.kind == "f":
        targets = ((targets - targets[train].mean()) / targets[train].std()).astype(np.float32)
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    return x[train], y[train], x[test], y[test]


def cylinder_bell_funnel(seed: int, train: int = 30, test: int = 900) -> Split:
    """Series of 128 points of three shapes, generated by the formula of Saito (1994).

    ``(6 + eta) * shape(t) + eps(t)`` between ``a`` and ``b``, and ``eps(t)`` outside: a cylinder is 1, a bell rises
    from 0 to 1, a funnel falls; ``a`` is uniform in 16 ... 32, ``b - a`` in 32 ... 96, ``eta`` and ``eps`` standard
    normal. 30 and 900 rows are the sizes of the set CBF in the UCR archive, classes in equal numbers.
    """
    rng = np.random.default_rng(seed)
    count = train + test
    kind = np.concatenate([np.arange(train) % 3, np.arange(test) % 3])
    begin, length = rng.integers(16, 33, count), rng.integers(32, 97, count)
    time = np.arange(1, 129)
    share = (time - begin[:, None]) / length[:, None]  # (N, T): 0 at a, 1 at b
    shape = np.stack([np.ones_like(share), share, 1 - share])[kind, np.arange(count)]
    inside = (share >= 0) & (share <= 1)
    series = (6 + rng.standard_normal((count, 1))) * shape * inside + rng.standard_normal((count, 128))
    x, y = torch.from_numpy(series.astype(np.float32))[:, None], torch.from_numpy(kind)
    return x[:train], y[:train], x[train:], y[train:]


PACKAGES = ("standard library", "pandas", "scipy", "torch")
TRAIN_SENTENCES, TEST_SENTENCES, LENGTH, VOCABULARY = 200, 500, 16, 3000  # the first two of each package


def sentences(seed: int) -> Split:
    """First sentences of docstrings: which package is it from? Names of the packages are left out."""
    rng = np.random.default_rng(seed)
    drawn = []
    for package in PACKAGES:
        found = first_sentences(package)
        drawn.append([found[i] for i in rng.permutation(len(found))[: TRAIN_SENTENCES + TEST_SENTENCES]])
    train = [words for own in drawn for words in own[:TRAIN_SENTENCES]]
    known = Counter(word for words in train for word in words).most_common(VOCABULARY - 2)
    number = {word: i + 2 for i, (word, _) in enumerate(known)}  # 0 is no word, 1 an unknown one

    def coded(rows: slice) -> tuple[Tensor, Tensor]:
        coded = np.zeros((len(PACKAGES) * len(drawn[0][rows]), LENGTH), dtype=np.int64)
        for row, words in zip(coded, (words for own in drawn for words in own[rows]), strict=True):
            row[: len(words)] = [number.get(word, 1) for word in words]
        return torch.from_numpy(coded), torch.arange(len(PACKAGES)).repeat_interleave(len(drawn[0][rows]))

    return *coded(slice(TRAIN_SENTENCES)), *coded(slice(TRAIN_SENTENCES, None))


@cache
def first_sentences(package: str) -> tuple[tuple[str, ...], ...]:
    """The words of each different first sentence in the docstrings of a package's source, tests left out."""
    paths = sysconfig.get_paths()
    root = Path(paths["stdlib"]) if package == "standard library" else Path(paths["purelib"]) / package
    names = "|".join(PACKAGES).replace("standard library", "python|stdlib") + "|scikit|pytorch|dataframe"
    found = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"tests", "test", "testing", "site-packages", "dist-packages", "lib2to3", "idlelib"} & {*parts}:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = (ast.get_docstring(node) or "").split("\n\n")[0].split(". ")[0]
                words = [word for word in re.findall(r"[a-z]+", text.lower()) if not re.fullmatch(names, word)]
                if 5 <= len(words) <= LENGTH:
                    found.add(tuple(words))
    return tuple(sorted(found))


def _mlp(split: Split) -> nn.Module:
    inputs, targets, *_ = split
    return MLP(inputs.shape[1], 1 if targets.is_floating_point() else int(targets.max()) + 1)


def _of_sklearn(load: Callable[[], Any]) -> Callable[[int], Split]:
    return lambda seed: rows_of_sklearn(load, seed)


TASKS = {
    "digits": Task(_of_sklearn(datasets.load_digits), _mlp, "0"),
    "wine": Task(_of_sklearn(datasets.load_wine), _mlp, "0"),
    "breast cancer": Task(_of_sklearn(datasets.load_breast_cancer), _mlp, "0"),
    "diabetes": Task(
        _of_sklearn(datasets.load_diabetes),
        _mlp,
        "0",
        is_number=True,
        methods=tuple(name for name in METHODS if name != "label smoothing"),
    ),
    "cylinder, bell, funnel": Task(cylinder_bell_funnel, lambda _: SeriesCNN(3), "0", epochs=80, batch=10),
    "sentences": Task(sentences, lambda _: SentenceTransformer(VOCABULARY, LENGTH, len(PACKAGES)), "layer", epochs=10),
}
