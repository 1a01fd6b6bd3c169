"""Two methods, seed by seed: how much they differ, how sure that is, and what may be said of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from types import ModuleType
from typing import Literal

__all__ = ["MARGINS", "Better", "Outcome", "PairedComparison", "compare_paired"]

Better = Literal["higher", "lower"]
Outcome = Literal["better", "worse", "no difference", "not distinguishable"]

LEVEL = 0.95  # of the interval; a test is two-sided, at 5 %
POWER = 0.8
MOST_SEEDS = 1000
_SAME = 1e-4  # of a difference: the error of one between two float32 numbers near 1
# Differences that are too small to matter, by the last part of a measure's key. A choice of this project: two standard
# errors of an accuracy of 95 % on 10,000 rows are 0.44 points; 0.02 nats are 2 % of the probability given to the right
# class; 0.01 of ECE is a point of confidence.
MARGINS = {"acc": 0.005, "accuracy": 0.005, "nll": 0.02, "ece": 0.01}


@dataclass(frozen=True)
class PairedComparison:
    """What the seeds say about a method against another.

    Attributes:
        difference: Mean of method - other.
        half_width: Half the 95 % interval of ``difference`` (Student's t); None where there is none: for fewer than two
            seeds, and for differences that are all the same (up to a ten-thousandth: metrics are float32) without being
            0, whose spread is then only rounded away, as that of one row in a small test set.
        seeds: Number of differences.
        deviation: Their sample standard deviation; None for fewer than two.
        outcome: ``better`` or ``worse`` where the interval leaves out 0; ``no difference`` where all of it is within
            the margin, or every difference is 0; else ``not distinguishable``.
    """

    difference: float
    half_width: float | None
    seeds: int
    deviation: float | None
    outcome: Outcome

    @property
    def seeds_needed(self) -> int | None:
        """Number of seeds with which a difference of this size and spread is found in 80 % of studies (two-sided, 5 %).

        None if more than 1,000, or where there is no difference or no interval.
        """
        if not self.half_width or not self.deviation:
            return None
        stats, effect = _scipy_stats(), self.difference / self.deviation

        def power(seeds: int) -> float:
            # a noncentral t, squared, is a noncentral F: both tails at once, and no NaN where the effect is large
            limit = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) ** 2
            return float(stats.ncf.sf(limit, 1, seeds - 1, seeds * effect**2))

        needed = 2 + bisect_left(range(2, MOST_SEEDS + 1), POWER, key=power)
        return needed if needed <= MOST_SEEDS else None


def compare_paired(differences: Sequence[float], better: Better, margin: float | None = None) -> PairedComparison:
    """Judge differences of paired runs, method - other, one for each seed.

    Args:
        differences: Finite, at least one.
        better: The direction of improvement.
        margin: The largest difference that does not matter, >= 0; None to never say that there is no difference, but
            for differences that are all 0.

    Raises:
        ValueError: If there is no difference, one is not finite, or the margin is negative.
        ImportError: If there are several and scipy is not installed.
    """
    if not differences or not all(map(math.isfinite, differences)):
        raise ValueError(f"differences must be finite, one for each seed, got {list(differences)}. Leave out others.")
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin must be >= 0, got {margin!r}. None is for measures without one.")
    seeds, found = len(differences), fmean(differences)
    if seeds < 2:
        return PairedComparison(found, None, seeds, None, "not distinguishable")
    if not any(differences):
        return PairedComparison(0.0, 0.0, seeds, 0.0, "no difference")
    if math.isclose(min(differences), max(differences), rel_tol=_SAME):
        return PairedComparison(found, None, seeds, 0.0, "not distinguishable")
    deviation = stdev(differences)
    half = float(_scipy_stats().t.ppf((1 + LEVEL) / 2, seeds - 1)) * deviation / math.sqrt(seeds)
    outcome: Outcome = "not distinguishable"
    if abs(found) > half:
        outcome = "better" if (found > 0) == (better == "higher") else "worse"
    elif margin is not None and abs(found) + half <= margin:
        outcome = "no difference"
    return PairedComparison(found, half, seeds, deviation, outcome)


def _scipy_stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Differences are judged with scipy: pip install 'mm-lightning[report]'.") from error
    module: ModuleType = stats
    return module
