"""The command ``python -m mm_lightning.inspect``, which takes what ``mm_lightning.train`` takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from mm_lightning.command import failure
from mm_lightning.command.configuration import CONF
from mm_lightning.command.train import quieten
from mm_lightning.look.inspection import inspect

__all__ = ["main"]


def main(overrides: Sequence[str] | None = None) -> None:
    """Run the command line: print the table for the first training batch of a configured experiment."""
    with failure.as_one_line():
        try:
            quieten()
            with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
                config = compose("train", overrides=list(sys.argv[1:] if overrides is None else overrides))
            pl.seed_everything(config.seed)
            data: pl.LightningDataModule = instantiate(config.data)
            module: pl.LightningModule = instantiate(config.model)
            data.prepare_data()
            data.setup("fit")
            print(inspect(module, next(iter(data.train_dataloader()))))
        except Exception as error:
            raise failure.JobFailed(error) from error
