"""The number that a sweeper is told of a run."""

from __future__ import annotations

from collections.abc import Mapping

from mm_lightning.command.best_checkpoint import AUTO
from mm_lightning.command.metric_names import direction_of, found_metric

__all__ = ["objective_of"]


def objective_of(metrics: Mapping[str, float], objective: str) -> float:
    """Return a run's metric of a name.

    Args:
        metrics: Final ones of the run.
        objective: Key of one of them; ``"auto"`` is what the best checkpoint is kept by, with the sign that makes more
            the better.

    Raises:
        ValueError: If there is no such metric.
    """
    key = found_metric(metrics) if objective == AUTO else objective
    if key is None or key not in metrics:
        raise ValueError(
            f"objective {objective!r} is none of the metrics of the run. These are {', '.join(sorted(metrics))}."
        )
    return -metrics[key] if objective == AUTO and direction_of(key) == "min" else metrics[key]
