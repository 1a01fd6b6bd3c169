"""Models of pytorch-tabular, built by its TabularModel, on the batch that its loader made."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel, models
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

from third_party.case import ROWS, Case, targets
from third_party.fitted import Fitted, KeepBatch

HEAD = {"layers": "8", "activation": "ReLU"}
ATTENTION = {"input_embed_dim": 8, "num_heads": 2, "num_attn_blocks": 1}


def cases() -> list[Case]:
    return [
        case("CategoryEmbeddingModel", models.CategoryEmbeddingModelConfig, layers="8-8"),
        case("CategoryEmbeddingModel", models.CategoryEmbeddingModelConfig, task="regression", layers="8-8"),
        case("TabNetModel", models.TabNetModelConfig, n_d=4, n_a=4, virtual_batch_size=ROWS),
        case("AutoIntModel", models.AutoIntConfig, attn_embed_dim=4, num_heads=2, num_attn_blocks=1),
        case("TabTransformerModel", models.TabTransformerConfig, **ATTENTION),
        case("FTTransformerModel", models.FTTransformerConfig, **ATTENTION),
        case("GatedAdditiveTreeEnsembleModel", models.GatedAdditiveTreeEnsembleConfig, num_trees=2, tree_depth=2),
        case("GANDALFModel", models.GANDALFConfig, gflu_stages=2),
        case("DANetModel", models.DANetConfig, n_layers=2, k=2, abstlay_dim_1=8),
        case("NODEModel", models.NodeConfig, num_trees=4, num_layers=1, depth=2),
    ]


def case(name: str, config: Any, task: str = "classification", **settings: Any) -> Case:
    loss = {"classification": "nn.CrossEntropyLoss", "regression": "nn.MSELoss"}[task]
    fitted = Fitted(lambda kept: fit(config(task=task, **settings), task, kept))
    return Case(name, loss, fitted.module, fitted.batch, targets("target"), inputs=("continuous",), embeddings=("*",))


def fit(config: Any, task: str, kept: KeepBatch) -> None:
    """Let pytorch-tabular make the LightningModule, for an epoch of its own."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(2 * ROWS, 3)), columns=["a", "b", "c"])
    frame["d"] = rng.integers(0, 3, size=2 * ROWS).astype(str)
    frame["y"] = rng.normal(size=2 * ROWS) if task == "regression" else np.arange(2 * ROWS) % 3
    with tempfile.TemporaryDirectory() as folder:
        model = TabularModel(
            data_config=DataConfig(target=["y"], continuous_cols=["a", "b", "c"], categorical_cols=["d"]),
            model_config=config,
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                batch_size=ROWS,
                max_epochs=1,
                accelerator="cpu",
                checkpoints=None,
                early_stopping=None,
                load_best=False,
                progress_bar="none",
                checkpoints_path=folder,
            ),
            verbose=False,
        )
        model.fit(train=frame, validation=frame[:ROWS], callbacks=[kept])
