"""The command ``python -m mm_lightning.inspect``, which takes what ``mm_lightning.train`` takes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from mm_lightning.command.checks import check_config
from mm_lightning.command.model import build_model, fitted_to_data
from mm_lightning.command.train import quieten
from mm_lightning.look.inspection import inspect
from mm_lightning.study.epochs import one_number_of_epochs

__all__ = ["print_table"]


def print_table(config: DictConfig) -> None:
    """Print the table of ``inspect`` for the first training batch of a configured experiment."""
    quieten()
    one_number_of_epochs(config, HydraConfig.get().overrides.task if HydraConfig.initialized() else [])
    check_config(config)
    pl.seed_everything(config.seed)
    data: pl.LightningDataModule = instantiate(config.data)
    module = build_model(fitted_to_data(config, data))
    data.prepare_data()
    data.setup("fit")
    mixup: Any = instantiate(config.mixup) if "_target_" in config.mixup else None
    way = {} if mixup is None else {"interpolation": mixup.interpolation, "per_sample": mixup.per_sample}
    print(inspect(module, next(iter(data.train_dataloader())), **way))
    if mixup is not None and mixup.layers != "auto":
        print(f"mixup.layers is {mixup.layers!r}.")
