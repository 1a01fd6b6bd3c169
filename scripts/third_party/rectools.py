"""Recommenders of rectools, which build their LightningModule when they fit, on the batch that they made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models.nn.transformers.bert4rec import BERT4RecModel
from rectools.models.nn.transformers.sasrec import SASRecModel

from third_party.case import ROWS, Case, targets
from third_party.fitted import Fitted, KeepBatch

SMALL = {"n_blocks": 1, "n_heads": 2, "n_factors": 8, "session_max_len": 6, "batch_size": ROWS, "epochs": 1}


def cases() -> list[Case]:
    return [
        case("SASRec", "cross-entropy of the next items", SASRecModel, loss="softmax"),
        case("SASRec, BCE", "BCE of items and negatives", SASRecModel, loss="BCE", n_negatives=2),
        case("BERT4Rec", "cross-entropy of masked items", BERT4RecModel, loss="softmax"),
    ]


def case(name: str, style: str, model: Any, **settings: Any) -> Case:
    fitted = Fitted(lambda kept: fit(model, kept, **settings))
    names = ("y", "yw", "negatives") if "n_negatives" in settings else ("y", "yw")
    layers = ("auto", "torch_model.transformer_layers")
    return Case(
        f"TransformerLightningModule, {name}", style, fitted.module, fitted.batch, targets(*names), layers=layers
    )


def fit(model: Any, kept: KeepBatch, **settings: Any) -> None:
    """Let rectools make the LightningModule, for an epoch of its own."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(ROWS), 6)
    frame = pd.DataFrame({Columns.User: users, Columns.Item: rng.integers(0, 9, size=len(users))})
    frame[Columns.Weight], frame[Columns.Datetime] = 1.0, pd.date_range("2020", periods=len(users))

    def trainer() -> pl.Trainer:
        return pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[kept])

    model(**SMALL, **settings, get_trainer_func=trainer).fit(Dataset.construct(frame))
