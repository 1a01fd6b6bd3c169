"""Methods of lightning-uq-box, around a small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_uq_box import uq_methods as uq
from torch import nn

from third_party.case import Case, integers, reals, targets


def cases() -> list[Case]:
    return [
        numbers("DeterministicRegression", "nn.MSELoss", lambda: uq.DeterministicRegression(net(1), nn.MSELoss())),
        numbers("MVERegression", "Gaussian negative log-likelihood", lambda: uq.MVERegression(net(2), burnin_epochs=0)),
        numbers("QuantileRegression", "pinball loss", lambda: uq.QuantileRegression(net(3))),
        numbers("DER", "evidential loss", lambda: uq.DER(net(4))),
        numbers("MCDropoutRegression", "nn.MSELoss, dropout", lambda: uq.MCDropoutRegression(net(1), 3, nn.MSELoss())),
        Case(
            "DeterministicClassification",
            "nn.CrossEntropyLoss",
            lambda: uq.DeterministicClassification(net(3), nn.CrossEntropyLoss()),
            lambda: {"input": reals(5), "target": integers(3)},
            targets("target"),
            inputs=("input",),
        ),
        Case(
            "MasksemblesClassification",
            "nn.CrossEntropyLoss, of repeated rows",
            lambda: uq.MasksemblesClassification(net(3), nn.CrossEntropyLoss(), 2, 2.0),
            lambda: {"input": reals(5), "target": integers(3)},
            targets("target"),
            inputs=("input",),
        ),
    ]


def numbers(name: str, loss: str, make: Callable[[], Any]) -> Case:
    def batch() -> Any:
        return {"input": reals(5), "target": reals(1, seed=3)}

    return Case(name, loss, make, batch, targets("target"), inputs=("input",))


def net(outputs: int) -> nn.Module:
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs)]
    return nn.Sequential(*layers)
