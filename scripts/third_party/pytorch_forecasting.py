"""Forecasting networks of pytorch-forecasting, on the batch that its TimeSeriesDataSet makes of seven series."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytorch_forecasting as ptf
from pytorch_forecasting.data.encoders import GroupNormalizer
from pytorch_forecasting.metrics import MAE, NormalDistributionLoss, QuantileLoss

from third_party.case import ROWS, Case, without_dropout

ENCODER, DECODER = 8, 4
INSIDE = ((0, "encoder_cont"), (0, "decoder_cont"))


def cases() -> list[Case]:
    def case(name: str, loss: str, build: Callable[[], Any], *layers: str, **more: Any) -> Case:
        return Case(
            name,
            loss,
            lambda: without_dropout(build()),
            batch_of(**more),
            layers=("auto", *layers),
            inputs=INSIDE,
        )

    return [
        case("NBeats", "MASE of the forecast + share of the backcast's", nbeats, target_only=True),
        case("NHiTS", "MAE", lambda: of(ptf.NHiTS, hidden_size=16, loss=MAE())),
        case("DecoderMLP", "MAE", lambda: of(ptf.DecoderMLP, hidden_size=16, loss=MAE())),
        case("TemporalFusionTransformer", "QuantileLoss", tft),
        case("RecurrentNetwork", "MAE", lambda: of(ptf.RecurrentNetwork, hidden_size=8, loss=MAE())),
        case("DeepAR", "NormalDistributionLoss", deepar),
        case("TiDEModel", "MAE", lambda: of(tide(), hidden_size=8, loss=MAE())),
        case("TimeXer", "MAE", lambda: of(timexer(), hidden_size=8, n_heads=2, e_layers=1, patch_length=4, loss=MAE())),
    ]


@functools.cache
def dataset(target_only: bool = False) -> Any:
    """Seven series of a target and a known covariate."""
    rng = np.random.default_rng(0)
    length = ENCODER + DECODER
    frame = pd.DataFrame(
        {
            "series": np.repeat([f"s{i}" for i in range(ROWS)], length),
            "time": np.tile(np.arange(length), ROWS),
            "value": rng.normal(size=ROWS * length).cumsum() + np.repeat(rng.normal(size=ROWS) * 3, length),
            "covariate": rng.normal(size=ROWS * length),
        }
    )
    covariates: dict[str, Any] = {} if target_only else {"time_varying_known_reals": ["covariate"]}
    return ptf.TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=ENCODER,
        max_prediction_length=DECODER,
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["series"]),
        add_relative_time_idx=False,
        **covariates,
    )


def batch_of(target_only: bool = False) -> Callable[[], Any]:
    """What the package's own loader makes."""
    return lambda: next(iter(dataset(target_only).to_dataloader(train=False, batch_size=ROWS)))


def of(model: Any, **settings: Any) -> Any:
    return model.from_dataset(dataset(), **settings)


def nbeats() -> Any:
    return ptf.NBeats.from_dataset(
        dataset(True),
        num_blocks=[1, 1],
        num_block_layers=[2, 2],
        widths=[16, 16],
        expansion_coefficient_lengths=[3, 4],
        backcast_loss_ratio=0.5,
    )


def deepar() -> Any:
    return of(ptf.DeepAR, hidden_size=8, rnn_layers=1, loss=NormalDistributionLoss())


def tide() -> Any:
    from pytorch_forecasting.models.tide import TiDEModel

    return TiDEModel


def timexer() -> Any:
    from pytorch_forecasting.models.timexer import TimeXer

    return TimeXer


def tft() -> Any:
    settings = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 8, "output_size": 7}
    return of(ptf.TemporalFusionTransformer, loss=QuantileLoss(), **settings)
