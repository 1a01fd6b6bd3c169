"""Mixup by other means than the callback: training steps that take the place of the module's own."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.networks import Network

__all__ = ["HandWritten", "InputMixup", "Textbook", "TwoPasses", "input_mixups"]

Batch = tuple[Tensor, Tensor]


class HandWritten(ABC):
    """A training step with manifold mixup written by hand: the layer, ``lam`` and the partners are drawn in it.

    Args:
        network: What is trained.
        alpha: Parameter of ``lam ~ Beta(alpha, alpha)``.
        compiled: Options of ``torch.compile`` for the forward pass; None leaves it as it is.
    """

    def __init__(self, network: Network, alpha: float = 2.0, compiled: dict[str, Any] | None = None) -> None:
        self.network = network
        self.alpha = alpha
        self.rng = np.random.default_rng(0)
        self.places = list(network.places.values())
        if compiled is not None:
            self.logits = torch.compile(self.logits, **compiled)  # type: ignore[method-assign]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw, and return the loss of a batch."""
        inputs, targets = batch
        place = self.places[self.rng.integers(len(self.places))]
        lam = torch.tensor([self.rng.beta(self.alpha, self.alpha)], dtype=inputs.dtype)
        partner = torch.from_numpy(self.rng.permutation(len(inputs)))
        logits = self.logits(inputs, place, lam, partner)
        if self.network.record is not None:
            self.network.record(logits.detach(), targets)
        return self.loss(logits, targets, lam, partner)

    @abstractmethod
    def logits(self, inputs: Tensor, place: int, lam: Tensor, partner: Tensor) -> Tensor:
        """Logits (N, K) of a batch that is mixed on the way.

        Args:
            inputs: The batch, (N, ...).
            place: Index of the part before which it is mixed.
            lam: Weight of the rows themselves, (1,).
            partner: The row mixed into each row, a permutation, (N,).
        """

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        """Loss of logits (N, K) on mixed targets, of which the batch's own are class indices (N,)."""


class Textbook(HandWritten):
    """The loop of Verma et al. (2019) as their code has it: one-hot targets, mixed by the formula as the batch is.

    After their ``mixup_process`` (vikasverma1077/manifold_mixup, supervised/models/utils.py), but for the loss: theirs
    is the binary cross-entropy of the softmax, here it is the cross-entropy, as on all other sides.
    """

    def logits(self, inputs: Tensor, place: int, lam: Tensor, partner: Tensor) -> Tensor:
        """See :meth:`HandWritten.logits`."""
        hidden = inputs
        for index, part in enumerate(self.network.parts):
            if index == place:
                hidden = _mixed(hidden, hidden[partner], lam)
            hidden = part(hidden)
        return hidden

    def loss(self, logits: Tensor, targets: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        """See :meth:`HandWritten.loss`."""
        soft = F.one_hot(targets, self.network.classes).to(logits.dtype)
        return F.cross_entropy(logits, _mixed(soft, soft[partner], lam))


class TwoPasses(HandWritten):
    """Runs the batch and the permuted batch up to the layer, each on its own, and what they become together from there.

    The loss is two cross-entropies, interpolated.
    """

    def logits(self, inputs: Tensor, place: int, lam: Tensor, partner: Tensor) -> Tensor:
        """See :meth:`HandWritten.logits`."""
        hidden, other = inputs, inputs[partner]
        for index, part in enumerate(self.network.parts):
            if index == place:
                hidden = _mixed(hidden, other, lam)
            hidden = part(hidden)
            if index < place:
                other = part(other)
        return hidden

    def loss(self, logits: Tensor, targets: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        """See :meth:`HandWritten.loss`."""
        own, others = F.cross_entropy(logits, targets), F.cross_entropy(logits, targets[partner])
        return _mixed(own, others, lam).squeeze(0)


class InputMixup:
    """A training step on a batch that a library's mixup has mixed at the input.

    Args:
        network: What is trained.
        mix: Makes mixed inputs (N, ...) and class probabilities (N, K) of inputs and class indices (N,).
    """

    def __init__(self, network: Network, mix: Callable[[Tensor, Tensor], Batch]) -> None:
        self.network = network
        self.mix = mix

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        mixed, soft = self.mix(inputs, targets)
        logits = self.network.module(mixed)
        if self.network.record is not None:
            self.network.record(logits.detach(), targets)
        return F.cross_entropy(logits, soft)


def input_mixups(network: Network, alpha: float = 2.0) -> tuple[dict[str, InputMixup], list[str]]:
    """The input mixup of libraries that can be imported here, and a sentence for each that cannot."""
    mixes: dict[str, Any] = {}
    notes = []
    if (timm := _imported("timm", "timm.data.mixup")) is not None:
        mixes["input mixup, timm"] = timm.Mixup(mixup_alpha=alpha, label_smoothing=0.0, num_classes=network.classes)
    else:
        notes.append("timm cannot be imported here (it needs torchvision), so its input mixup is left out.")
    if (v2 := _imported("torchvision", "torchvision.transforms.v2")) is not None:
        mixes["input mixup, torchvision v2.MixUp"] = v2.MixUp(alpha=alpha, num_classes=network.classes)
    else:
        notes.append("torchvision cannot be imported here, so its v2.MixUp is left out.")
    return {name: InputMixup(network, mix) for name, mix in mixes.items()}, notes


def _imported(package: str, module: str) -> Any | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return import_module(module)
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        return None


def _mixed(own: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    return own * lam + other * (1 - lam)
