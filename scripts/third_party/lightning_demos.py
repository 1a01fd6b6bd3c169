"""The demonstration modules that come with Lightning itself."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer

from third_party.case import Case, integers, reals, targets, without_dropout

VOCABULARY = 11


def cases() -> list[Case]:
    return [
        Case("BoringModel", "F.mse_loss to ones", BoringModel, rows_of_reals, layers=("auto", "layer")),
        Case("ManualOptimBoringModel", "the same, manual", ManualOptimBoringModel, rows_of_reals),
        Case("DemoModel", "the sum of the output", DemoModel, rows_of_reals, layers=("auto", "l1"), inputs=((),)),
        Case(
            "LightningTransformer",
            "F.nll_loss; the decoder reads the targets",
            make_transformer,
            text,
            layers=("auto", "model.transformer"),
            embeddings=("model.embedding",),
        ),
        Case(
            "LightningLSTM",
            "F.nll_loss; keeps its hidden state",
            lambda: without_data(LightningLSTM(VOCABULARY)),
            text,
            targets(1),
            layers=("auto", "model.encoder"),
            embeddings=("model.encoder",),
        ),
    ]


def rows_of_reals() -> torch.Tensor:
    """Standard normal numbers, (N, 32)."""
    return reals(32)


def text() -> Any:
    """Tokens and the next tokens, int64, two of (N, 5)."""
    tokens = integers(VOCABULARY, 6)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def without_data(module: Any) -> pl.LightningModule:
    """Leave the download of its text alone."""
    module.prepare_data = lambda: None
    return module


def make_transformer() -> pl.LightningModule:
    """Without dropout, which the reference's two runs would draw for different rows."""
    return without_dropout(without_data(LightningTransformer(VOCABULARY)))
