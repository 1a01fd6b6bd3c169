"""Estimators of deeptab, which build their LightningModule when they fit, on the batch that they made."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pandas as pd
from deeptab import models

from third_party.case import ROWS, Case, with_sgd
from third_party.fitted import Fitted, KeepBatch


def cases() -> list[Case]:
    return [
        case("MLPRegressor", "nn.MSELoss"),
        case("MLPClassifier", "nn.CrossEntropyLoss"),
        case("ResNetRegressor", "nn.MSELoss"),
        case("FTTransformerRegressor", "nn.MSELoss"),
        case("TabMRegressor", "nn.MSELoss"),
        case("MLPLSS", "negative log-likelihood of a normal distribution", family="normal"),
    ]


def case(name: str, loss: str, **settings: Any) -> Case:
    fitted = Fitted(lambda kept: fit(name, kept, **settings))
    return Case(
        name,
        loss,
        lambda: with_sgd(fitted.module()),
        fitted.batch,
        targets_of_pair,
        inputs=((0, 0),),
        embeddings=("*",),
    )


def targets_of_pair(batch: Any, partner: Any) -> Any:
    """The batch is ((numbers, categories, embeddings), labels)."""
    data, labels = batch
    return type(batch)([data, labels[partner]])


def fit(name: str, kept: KeepBatch, **settings: Any) -> None:
    """Let deeptab make the LightningModule, for an epoch of its own."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(4 * ROWS, 3)), columns=["a", "b", "c"])
    y = rng.integers(0, 3, size=len(frame)) if name.endswith("Classifier") else rng.normal(size=len(frame))
    with tempfile.TemporaryDirectory() as folder:
        getattr(models, name)().fit(
            frame,
            y,
            max_epochs=1,
            batch_size=ROWS,
            checkpoint_path=folder,
            callbacks=[kept],
            accelerator="cpu",
            **settings,
        )
