"""Message passing networks of chemprop, on seven small molecules."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from chemprop import data, models, nn

from third_party.case import Case, targets, without_dropout

SMILES = ["CCO", "CC(=O)O", "c1ccccc1", "CCN(C)C", "C1CCCC1O", "O=C=O", "CC#N"]
OTHERS = ["CO", "CCC", "CN", "C=C", "CCl", "CBr", "CS"]


def cases() -> list[Case]:
    return [
        case("MPNN", "MSE, of targets that are there", lambda: nn.RegressionFFN(**sizes()), "agg"),
        case("MPNN, two uncertainties", "Gaussian negative log-likelihood", lambda: nn.MveFFN(**sizes())),
        case("MPNN, evidential", "evidential loss", lambda: nn.EvidentialFFN(**sizes())),
        case("MPNN, binary", "BCE with logits", lambda: nn.BinaryClassificationFFN(**sizes()), kind="binary"),
        case(
            "MPNN, classes",
            "cross-entropy",
            lambda: nn.MulticlassClassificationFFN(n_classes=3, **sizes()),
            kind="classes",
        ),
        Case(
            "MulticomponentMPNN",
            "MSE, of pairs of molecules",
            multicomponent,
            functools.partial(pairs, "numbers"),
            targets("Y", "w"),
            layers=("auto", "predictor.ffn.0"),
        ),
    ]


def sizes() -> dict[str, Any]:
    return {"input_dim": 8, "hidden_dim": 8}


def case(name: str, loss: str, head: Any, *layers: str, kind: str = "numbers") -> Case:
    def make() -> Any:
        passing = nn.BondMessagePassing(d_h=8, depth=2)
        return without_dropout(models.MPNN(passing, nn.MeanAggregation(), head(), batch_norm=True))

    return Case(name, loss, make, functools.partial(molecules, kind), targets("Y", "w"), layers=("auto", *layers))


def multicomponent() -> Any:
    blocks = [nn.BondMessagePassing(d_h=8, depth=2) for _ in range(2)]
    passing = nn.MulticomponentMessagePassing(blocks, n_components=2)
    head = nn.RegressionFFN(input_dim=passing.output_dim, hidden_dim=8)
    return models.MulticomponentMPNN(passing, nn.MeanAggregation(), head)


def molecules(kind: str) -> Any:
    """A batch of seven graphs, with a target each."""
    dataset = dataset_of(SMILES, kind)
    return data.collate_batch([dataset[i] for i in range(len(dataset))])


def pairs(kind: str) -> Any:
    """A batch of seven pairs of graphs."""
    dataset = data.MulticomponentDataset([dataset_of(SMILES, kind), dataset_of(OTHERS, kind)])
    return data.collate_multicomponent([dataset[i] for i in range(len(dataset))])


def dataset_of(smiles: list[str], kind: str) -> Any:
    rng = np.random.default_rng(0)
    ys = {
        "numbers": rng.normal(size=(7, 1)),
        "binary": rng.integers(0, 2, (7, 1)),
        "classes": rng.integers(0, 3, (7, 1)),
    }
    weights = rng.uniform(0.5, 1.5, size=7)
    points = zip(smiles, ys[kind].astype(float), weights, strict=True)
    return data.MoleculeDataset([data.MoleculeDatapoint.from_smi(smi, y, weight=w) for smi, y, w in points])
