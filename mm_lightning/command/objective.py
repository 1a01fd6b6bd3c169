"""The number that a sweeper is told of a run, and whether there is one that may choose."""

from __future__ import annotations

from collections.abc import Mapping

from hydra.utils import get_object
from omegaconf import DictConfig

from mm_lightning.command.best_checkpoint import AUTO
from mm_lightning.command.metric_names import direction_of, found_metric

__all__ = ["check_may_choose", "objective_of"]


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


def check_may_choose(data: DictConfig, what: str) -> None:
    """Refuse to choose by a validation that sees the test images.

    Args:
        data: Configuration of the data.
        what: Who would choose, as the beginning of a sentence.

    Raises:
        ValueError: If validation sees them.
    """
    knows_of_it = hasattr(get_object(data._target_), "validates_on_test")
    if knows_of_it and data.get("num_validation") == 0:
        text = f"{what}, but with data.num_validation=0 validation sees the test images, which may choose nothing"
        raise ValueError(f"{text}. Give data.num_validation=5000.")
