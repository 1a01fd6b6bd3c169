"""Forecasting modules of darts, built by darts itself, on the batch that its loader made of seven series."""

from __future__ import annotations

from typing import Any

import numpy as np
from darts import TimeSeries, models
from darts.utils.likelihood_models.torch import GaussianLikelihood

from third_party.case import ROWS, Case
from third_party.fitted import Fitted, KeepBatch

PAST, FUTURE = 8, 4
SMALL: dict[str, dict[str, Any]] = {
    "NBEATSModel": {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 8},
    "NHiTSModel": {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 8},
    "DLinearModel": {"kernel_size": 3},
    "NLinearModel": {},
    "TiDEModel": {"hidden_size": 8, "temporal_decoder_hidden": 8},
    "TCNModel": {"num_filters": 4},
    "BlockRNNModel": {"hidden_dim": 8},
    "TransformerModel": {"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1},
    "TSMixerModel": {"hidden_size": 8, "ff_size": 8},
}
LAYERS = {"NLinearModel": "layer", "BlockRNNModel": "rnn", "TransformerModel": "encoder"}


def cases() -> list[Case]:
    plain = [case(name) for name in SMALL]
    return [*plain, case("BlockRNNModel", "Gaussian negative log-likelihood", likelihood=GaussianLikelihood())]


def case(name: str, loss: str = "MSE", **settings: Any) -> Case:
    layers = ("auto", LAYERS[name]) if name in LAYERS else ("auto",)
    fitted = Fitted(lambda kept: fit(name, kept, **settings))
    return Case(name, loss, fitted.module, fitted.batch, layers=layers, enters=("",))


def fit(name: str, kept: KeepBatch, **settings: Any) -> None:
    """Let darts make the LightningModule, for an epoch of its own."""
    rng = np.random.default_rng(0)
    all_series = [TimeSeries.from_values(rng.normal(size=(PAST + FUTURE, 1)).cumsum(0)) for _ in range(ROWS)]
    model = getattr(models, name)(
        input_chunk_length=PAST,
        output_chunk_length=FUTURE,
        n_epochs=1,
        batch_size=ROWS,
        pl_trainer_kwargs={"accelerator": "cpu", "callbacks": [kept], "enable_progress_bar": False},
        **SMALL[name],
        **settings,
    )
    model.fit(all_series)
