"""Forecasting networks of neuralforecast, on batches of seven series of one window each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from neuralforecast import models
from neuralforecast.losses.pytorch import MAE, DistributionLoss, MQLoss

from third_party.case import Case, reals, without_dropout

PAST, FUTURE = 8, 4
SMALL: dict[str, dict[str, Any]] = {
    "MLP": {"hidden_size": 8},
    "NBEATS": {"mlp_units": 3 * [[8, 8]]},
    "NHITS": {"mlp_units": 3 * [[8, 8]]},
    "TFT": {"hidden_size": 8, "n_head": 2},
    "DLinear": {"moving_avg_window": 3},
    "NLinear": {},
    "LSTM": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "GRU": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "TCN": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "TiDE": {"hidden_size": 8, "decoder_output_dim": 4, "temporal_decoder_dim": 8},
    "PatchTST": {"hidden_size": 8, "n_heads": 2, "encoder_layers": 1, "linear_hidden_size": 8, "patch_len": 4},
}
LAYERS = {"MLP": "mlp.0", "TFT": "temporal_fusion_decoder", "LSTM": "hist_encoder", "TCN": "hist_encoder"}


def cases() -> list[Case]:
    drawn = "MAE, of windows drawn in the step"
    return [
        Case("MLP, as it is by default", drawn, lambda: make("MLP", windows=1024), series, enters=("",)),
        *(case(name, "MAE, masked") for name in SMALL),
        case("DeepAR", "negative log-likelihood of StudentT", lstm_hidden_size=8, decoder_hidden_layers=0),
        case("NHITS", "MQLoss"),
    ]


LOSSES: dict[str, Callable[[], Any]] = {
    "MAE, masked": MAE,
    "MQLoss": lambda: MQLoss(level=[80]),
    "negative log-likelihood of StudentT": lambda: DistributionLoss("StudentT", level=[80]),
}


def case(name: str, loss: str, **settings: Any) -> Case:
    named = (LAYERS[name],) if name in LAYERS else ()
    build = functools.partial(make, name, loss, **settings)
    return Case(name, loss, build, series, layers=("auto", *named), enters=("",))


def make(name: str, loss: str = "MAE, masked", windows: int | None = None, **settings: Any) -> Any:
    """A model that takes every window once, unless it is told to draw some."""
    kwargs = {"h": FUTURE, "input_size": PAST, "max_steps": 1, "step_size": FUTURE + 1}
    model = getattr(models, name)(**kwargs, loss=LOSSES[loss](), **SMALL.get(name, {}), **settings)
    model.windows_batch_size = windows
    return without_dropout(model)


def series() -> dict[str, Any]:
    """What its dataset collates: series (N, channels, length), all observed."""
    values = reals(1, PAST + FUTURE)
    temporal = torch.cat([values, torch.ones_like(values)], dim=1)
    return {"temporal": temporal, "temporal_cols": pd.Index(["y", "available_mask"]), "y_idx": 0}
