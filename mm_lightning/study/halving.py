"""Which strength of each method goes on: successive halving, with whole trainings of further seeds as the resource.

Epochs are no resource here: a training on mixed data is behind in its first epochs, where an early stop would cut off
the very methods that are asked about.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from mm_lightning.study.candidates import Candidate
from mm_lightning.study.statistics import Better

__all__ = ["Scores", "best_of", "most_runs"]

# What a batch of trainings gave: the score of each candidate and seed; None where it failed or is not finite.
Scores = Mapping[tuple[Candidate, int], float | None]

REDUCTION = 2  # of the candidates that reach a rung, one in so many goes on


def best_of(
    methods: Sequence[Sequence[Candidate]],
    seeds: Sequence[int],
    better: Better,
    train: Callable[[Sequence[tuple[Candidate, int]]], Scores],
) -> list[Candidate | None]:
    """Find the best candidate of each method.

    All are trained with the first half of the seeds, and those that Optuna's asynchronous successive halving (Li et
    al., MLSys 2020) promotes with the others. It is asked in the order of the candidates, so that the first one of a
    method always goes on.

    Args:
        methods: The candidates of each method, the usual one first.
        seeds: An even number of them, the same for all.
        better: The direction of improvement of a score.
        train: Trains candidates with seeds, and returns the scores.

    Returns:
        For each method the candidate with the best mean score of those that got all seeds; None where none has scores.

    Raises:
        ImportError: Without Optuna.
    """
    optuna = _optuna()
    half = len(seeds) // 2
    contested = [own for own in methods if len(own) > 1]
    scores: dict[tuple[Candidate, int], float | None] = dict(
        train([(one, seed) for own in contested for one in own for seed in seeds[:half]])
    )
    races = [_Race(optuna, own, half, better, scores, seeds) for own in contested]
    scores.update(train([(one, seed) for race in races for one in race.promoted for seed in seeds[half:]]))
    found = {id(race.candidates): race.best(scores, seeds) for race in races}
    return [found.get(id(own), own[0]) for own in methods]


def most_runs(methods: Sequence[Sequence[Candidate]], seeds: int) -> int:
    """Return how many trainings :func:`best_of` takes at most."""
    return sum(len(own) * seeds for own in methods if len(own) > 1)


class _Race:
    """The candidates of one method."""

    def __init__(
        self,
        optuna: ModuleType,
        candidates: Sequence[Candidate],
        half: int,
        better: Better,
        scores: Scores,
        seeds: Sequence[int],
    ) -> None:
        self.candidates = candidates
        self._better = better
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=half, reduction_factor=REDUCTION)
        study = optuna.create_study(direction="maximize" if better == "higher" else "minimize", pruner=pruner)
        self.promoted = []
        for candidate in candidates:
            trial = study.ask()
            trial.report(_mean([scores[candidate, seed] for seed in seeds[:half]]), step=half)
            if not trial.should_prune():
                self.promoted.append(candidate)

    def best(self, scores: Scores, seeds: Sequence[int]) -> Candidate | None:
        means = {one: _mean([scores[one, seed] for seed in seeds]) for one in self.promoted}
        finite = [one for one in self.promoted if math.isfinite(means[one])]
        sign = 1 if self._better == "higher" else -1
        return max(finite, key=lambda one: sign * means[one], default=None)


def _mean(scores: Sequence[float | None]) -> float:
    """The mean; NaN, with which a trial is never promoted, where one is missing."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else math.nan


def _optuna() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Optuna 2, which hydra-optuna-sweeper needs, imports
            import optuna
    except ImportError as error:
        raise ImportError("mm-study searches with Optuna: pip install 'mm-lightning[study]'.") from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna
