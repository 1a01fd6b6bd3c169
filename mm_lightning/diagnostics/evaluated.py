"""What is logged of a classifier's rows: scores, those after a temperature, and the numbers of a closer look."""

from __future__ import annotations

import math
from typing import NamedTuple

from mm_lightning.diagnostics.classified import Classified
from mm_lightning.diagnostics.closer_look import Found
from mm_lightning.diagnostics.temperature_pass import Fitted
from mm_lightning.evaluation.scores import Reliability, reliability, scores

__all__ = ["Evaluated", "evaluated", "of_groups"]

_SCALED = ("nll", "ece", "brier", "overconfidence")  # what a temperature changes and is asked for


class Evaluated(NamedTuple):
    """Scores of rows.

    Attributes:
        scores: By ``"plain"`` and, after a temperature, ``"scaled"``; see :func:`mm_lightning.evaluation.scores`.
        bins: The same way.
        logged: By the last part of their log keys.
    """

    scores: dict[str, dict[str, float]]
    bins: dict[str, Reliability]
    logged: dict[str, float]


def evaluated(rows: Classified, num_bins: int, fitted: Fitted | None) -> Evaluated:
    """Score rows, also with a temperature if there is one."""
    log_probabilities = {"plain": rows.logits.log_softmax(dim=1)}
    if fitted is not None:
        log_probabilities["scaled"] = fitted.scaling(rows.logits).log_softmax(dim=1)
    found = {which: scores(each, rows.targets, num_bins) for which, each in log_probabilities.items()}
    bins = {which: reliability(each.exp(), rows.targets, num_bins) for which, each in log_probabilities.items()}
    logged = dict(found["plain"])
    if fitted is not None:
        ends = {"": fitted.fit.temperature, "_low": fitted.fit.low, "_high": fitted.fit.high}
        logged |= {f"temperature{end}": value for end, value in ends.items() if math.isfinite(value)}
        logged |= {f"{name}_scaled": found["scaled"][name] for name in _SCALED}
    return Evaluated(found, bins, logged)


def of_groups(groups: Found) -> dict[str, float]:
    """Return the numbers of a closer look by the last parts of their log keys."""
    logged: dict[str, float] = {}
    for group, each in groups.items():
        for name, numbers in each.items():
            place = {"spectra": f"spectrum/{name}", "neighbours": "neighbours"}.get(group, name)
            logged |= {f"{place}/{quantity}": number for quantity, number in numbers.items()}
    return logged
