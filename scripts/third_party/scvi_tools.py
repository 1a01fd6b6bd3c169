"""Training plans of scvi-tools, around its modules, on the batch that its loader makes of seven cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scvi

from third_party.case import ROWS, Case, without_dropout

SMALL = {"n_hidden": 8, "n_latent": 2}
NOISE = "KL + reconstruction of the input by {}, noise drawn"


def cases() -> list[Case]:
    return [
        case("TrainingPlan, SCVI", NOISE.format("ZINB"), lambda: scvi.model.SCVI, **SMALL),
        case("TrainingPlan, SCVI of two batches", NOISE.format("ZINB"), lambda: scvi.model.SCVI, batches=2, **SMALL),
        case(
            "TrainingPlan, SCVI of Poisson",
            NOISE.format("Poisson"),
            lambda: scvi.model.SCVI,
            gene_likelihood="poisson",
            **SMALL,
        ),
        case("TrainingPlan, LinearSCVI", NOISE.format("NB"), lambda: scvi.model.LinearSCVI, **SMALL),
        case("TrainingPlan, AUTOZI", NOISE.format("ZINB"), lambda: scvi.model.AUTOZI, **SMALL),
        case(
            "AdversarialTrainingPlan, SCVI", "the same, manual", lambda: scvi.model.SCVI, is_adversarial=True, **SMALL
        ),
    ]


def case(
    name: str, loss: str, kind: Callable[[], Any], *, is_adversarial: bool = False, batches: int = 1, **settings: Any
) -> Case:
    def make() -> Any:
        module = model(kind(), batches, settings).module
        plans = scvi.train
        plan = plans.AdversarialTrainingPlan(module, adversarial_classifier=False) if is_adversarial else None
        return without_dropout(plan or plans.TrainingPlan(module))

    def batch() -> Any:
        made = model(kind(), batches, settings)
        return next(iter(made._make_data_loader(made.adata, batch_size=ROWS)))

    return Case(name, loss, make, batch, enters=("module.z_encoder",))


def model(kind: Any, batches: int, settings: dict[str, Any]) -> Any:
    """A model of seven cells with counts of 20 genes, from so many batches."""
    rng = np.random.default_rng(0)
    cells = pd.DataFrame({"batch": [f"b{i % batches}" for i in range(ROWS)]}, index=[f"c{i}" for i in range(ROWS)])
    data = anndata.AnnData(rng.poisson(3, size=(ROWS, 20)).astype(np.float32), obs=cells)
    kind.setup_anndata(data, batch_key="batch")
    return kind(data, **settings)
