"""A temperature fitted to the logits of a pass over validation data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mm_lightning.diagnostics.classified import Classifier, OverheardLogits
from mm_lightning.diagnostics.loaders import Loader
from mm_lightning.evaluation.temperature import TemperatureFit, TemperatureScaling
from mm_lightning.namespaces import LightningModule, Trainer

__all__ = ["Fitted", "fitted_by_a_pass"]


class Fitted(NamedTuple):
    """A temperature."""

    scaling: TemperatureScaling
    fit: TemperatureFit


def fitted_by_a_pass(
    trainer: Trainer, module: LightningModule, classifier: Classifier, loader: Loader | None, max_rows: int
) -> Fitted | str:
    """Fit a temperature to validation data, or say why there is none. To be called by every process.

    Args:
        trainer: It is about to test.
        module: With the weights that are tested.
        classifier: Where its logits are.
        loader: Of the validation data; None if there are none.
        max_rows: Only the first so many rows are seen, on each process.
    """
    if loader is None:
        return "no temperature is fitted: there are no validation data. Pass data=, or test with a data module."
    overheard = OverheardLogits(classifier, max_rows)

    def see(batch: Any) -> bool:
        classifier.forward(module, batch)
        overheard.keep(trainer, module, batch, may_run=False)
        return overheard.is_done

    overheard.open(module)
    try:
        try:
            loader.show(trainer, module, see)
        except RuntimeError as error:  # of forward
            overheard.obstacle = str(error).rstrip(".")
        rows = overheard.rows(module, loader.is_shared)
    finally:
        overheard.close()
    if isinstance(rows, str):
        return f"no temperature is fitted: {rows}."
    with torch.inference_mode(False):  # what is kept can be trained with
        scaling = TemperatureScaling()
        try:
            return Fitted(scaling, scaling.fit(*rows))
        except ValueError as error:
            return f"no temperature is fitted. {error}"
