"""The LightningModules that the PyTorch estimators of gluonts make, on batches of the shapes that they describe."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from third_party.case import ROWS, Case, without_dropout

PAST, FUTURE = 8, 4
LOSS = "negative log-likelihood of StudentT, scaled by the past's mean"


def cases() -> list[Case]:
    return [
        case("simple_feedforward", "SimpleFeedForward", "model.nn", enters=("model",), hidden_dimensions=[8, 8]),
        case("d_linear", "DLinear", "model.linear_seasonal", hidden_dimension=8, kernel_size=3),
        case("patch_tst", "PatchTST", "model.patch_proj", patch_len=4, d_model=8, nhead=2, dim_feedforward=8),
        case("lag_tst", "LagTST", "model.encoder", freq="D", d_model=8, nhead=2, dim_feedforward=8),
        case("deepar", "DeepAR", "model.rnn", freq="D", hidden_size=8),
        case("tide", "TiDE", freq="D", num_feat_static_real=1),
        case("tft", "TemporalFusionTransformer", "model.temporal_decoder", freq="D", num_heads=2, hidden_dim=8),
    ]


def case(package: str, name: str, *layers: str, enters: tuple[str, ...] = (), **settings: Any) -> Case:
    """The LightningModule of an estimator."""
    lengths = {"prediction_length": FUTURE, "context_length": PAST}

    def make() -> Any:
        models = importlib.import_module(f"gluonts.torch.model.{package}")
        return without_dropout(getattr(models, f"{name}Estimator")(**lengths, **settings).create_lightning_module())

    loss = "quantile loss" if package == "tft" else LOSS
    return Case(f"{name}LightningModule", loss, make, batch_for(make), layers=("auto", *layers), enters=enters)


def batch_for(make: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """What the model says that it takes, in random numbers, and a future."""

    def batch() -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            model = make().model
            torch.manual_seed(5)
            inputs = model.describe_inputs(ROWS)
            made = {name: numbers(name, shape, inputs.dtypes[name]) for name, shape in inputs.shapes.items()}
            length = made["future_time_feat"].shape[1] if "future_time_feat" in made else FUTURE
            shape = made["past_target"].shape
            future = (ROWS, length, *shape[2:])
            made["future_target"], made["future_observed_values"] = 1 + torch.rand(future), torch.ones(future)
        return made

    return batch


def numbers(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of a tensor's kind: all is observed, and there is one category."""
    if "observed" in name:
        return torch.ones(shape, dtype=dtype)
    return 1 + torch.rand(shape) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
