"""Speech and other signals in time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from zoo.entry import ROWS, Entry, Module, classes, reals, seeded, targets

K = 4


class KeywordSpotter(Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv1d(4, 4, 3, stride=2), nn.ReLU())
        self.fc = nn.Linear(4, K)
        self.train_accuracy = MulticlassAccuracy(K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return F.log_softmax(self.fc(x.mean(dim=-1)), dim=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        waveform, _, label = batch
        output = self(waveform)
        self.train_accuracy.update(output, label)
        return nn.NLLLoss()(output, label)

    def on_train_epoch_end(self) -> None:
        self.log("train/accuracy", self.train_accuracy.compute())
        self.train_accuracy.reset()


class SpeechToText(Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU())
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.classifier = nn.Linear(8, K)
        self.criterion = nn.CTCLoss(blank=0, zero_infinity=True)

    def forward(self, spectrograms: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.encoder(spectrograms).transpose(1, 2))
        return F.log_softmax(self.classifier(hidden), dim=2).transpose(0, 1)  # (T, N, K)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        spectrograms, labels, input_lengths, label_lengths = batch
        return self.criterion(self(spectrograms), labels, input_lengths, label_lengths)


class FrameLabels(SpeechToText):
    """A class for every frame, positions last."""

    def __init__(self) -> None:
        super().__init__()
        self.frame_loss = nn.CrossEntropyLoss(reduction="sum")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        spectrograms, frames = batch
        scores = self(spectrograms).permute(1, 2, 0)  # (T, N, K) -> (N, K, T)
        return self.frame_loss(scores, frames) / frames.numel()


class EventDetector(SpeechToText):
    """Multi-label frames, counted up to the length of each recording."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, events, lengths = batch["x"], batch["events"], batch["lengths"]
        hidden, _ = self.rnn(self.encoder(x).transpose(1, 2))
        mask = (torch.arange(events.shape[1], device=x.device)[None] < lengths[:, None]).to(hidden.dtype)
        losses = F.binary_cross_entropy_with_logits(self.classifier(hidden), events, reduction="none").mean(dim=-1)
        return (losses * mask).sum() / mask.sum()


def _speech() -> Any:
    labels = classes(K, 3, start=1)
    return reals(3, 8), labels, torch.full((ROWS,), 8), torch.tensor([3, 2, 1, 2, 3, 2])


ENTRIES = [
    Entry(
        "KeywordSpotter",
        "speech",
        "log_softmax in forward, nn.NLLLoss in the step",
        seeded(KeywordSpotter),
        lambda: (reals(1, 9), 16000, classes(K)),
        targets(2),
        ("conv1", "input"),
    ),
    Entry(
        "SpeechToText",
        "speech",
        "nn.CTCLoss with lengths of inputs and targets",
        seeded(SpeechToText),
        _speech,
        targets(1, 3),
        ("encoder",),
    ),
    Entry(
        "FrameLabels",
        "speech",
        "CrossEntropyLoss (sum) on (N, K, T), divided by hand",
        seeded(FrameLabels),
        lambda: (reals(3, 5), classes(K, 5)),
        targets(1),
        ("encoder",),
    ),
    Entry(
        "EventDetector",
        "sound events",
        "BCE of frames, masked by the lengths of the labels",
        seeded(EventDetector),
        lambda: {
            "x": reals(3, 5),
            "events": classes(2, 5, K).double(),
            "lengths": torch.tensor([5, 3, 4, 5, 2, 4]),
        },
        targets("events", "lengths"),
        ("encoder",),
    ),
]
