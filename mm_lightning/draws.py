"""The plans of a fit: drawn as the callback says now, and what a checkpoint remembers of that."""

from __future__ import annotations

import math
import os
import re
from operator import is_
from typing import Any, Protocol

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mm_lightning.arguments import check_number, plain
from mm_lightning.mixup import BetaRatio, MixPlan, PlanSource
from mm_lightning.mixup.pairing import Pairing, RandomPermutation, check_pairing
from mm_lightning.mixup.plan import Interpolation
from mm_lightning.mixup.ratio import Ratio, check_ratio
from mm_lightning.mixup.schedule import DEFAULT_SCHEDULE, ScheduleSpec, check_schedule
from mm_lightning.mixup.seen import TARGETS, seen_by
from mm_lightning.mixup.source import PlansAhead, check_probability, check_seed, check_weights
from mm_lightning.namespaces import Trainer

AUTO = "auto"

__all__ = ["AUTO", "DrawnBy", "Draws", "check_changeable", "has_end", "place_of", "shown"]


class DrawnBy(Protocol):
    """What plans are drawn by: the callback's arguments of these names, which may change during a fit."""

    alpha: float | None
    ratio: Ratio
    per_sample: bool
    pairing: Pairing | None
    probability: float
    layer_weights: Any
    interpolation: Interpolation | None
    schedule: ScheduleSpec | str | None
    clean_weight: float
    seed: int | None
    targets: str | int | None


class Draws:
    """Draws the plans of a fit.

    Attributes:
        settings: What the last plans were drawn by, for a checkpoint: of Python's own types, or it would not load with
            ``weights_only``.
        restored: What they were drawn by in the run that is resumed.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.restored: dict[str, Any] = {}
        self._plans: PlansAhead | None = None
        self._drawn_by: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit."""
        return {**self.__dict__, "_plans": None, "_drawn_by": []}

    def forget(self) -> None:
        """End a fit."""
        self._plans = None
        self._drawn_by = []

    def draw(self, batch_size: int, place: dict[str, Any]) -> MixPlan:
        """Draw the plan of a batch, as :meth:`take_over` has been told."""
        assert self._plans is not None
        return self._plans.draw(batch_size, **place)

    def take_over(self, by: DrawnBy, layers: tuple[str, ...]) -> None:
        """Draw as the callback says now, and say what is otherwise than in the run that is resumed.

        Raises:
            TypeError: If an argument was set to something of a wrong type.
            ValueError: If it was set to a wrong value.
        """
        weights = None if by.layer_weights is None else plain(by.layer_weights)
        schedule = _schedule_of(by)
        schedule = schedule if schedule is None or callable(schedule) else plain(schedule)
        copied = [weights, schedule]
        key = [layers, by.ratio, by.probability, by.seed, by.pairing, by.clean_weight]
        # What may be changed in place is compared by what it holds.
        if self._plans is not None and self._drawn_by[-2:] == copied and all(map(is_, key, self._drawn_by)):
            return
        check_changeable(by, len(layers))
        source = PlanSource(
            layers,
            ratio=by.ratio,
            pairing=RandomPermutation() if by.pairing is None else by.pairing,
            weights=weights,
            probability=by.probability,
            seed=_global_seed() if by.seed is None else int(by.seed),
            interpolation=by.interpolation,
            schedule=schedule,
        )
        self._drawn_by = [*key, *copied]
        self._plans = PlansAhead(source)
        self._remember(by, source)

    def _remember(self, by: DrawnBy, source: PlanSource) -> None:
        weights = source.weights
        now = {
            "alpha": None if by.alpha is None else float(by.alpha),
            "per_sample": bool(by.per_sample),
            "probability": float(by.probability),
            "seed": source.seed,
            "layers": list(source.layers),
            "layer_weights": None if weights is None else list(map(float, weights)),
            "pairing": _lasting(source.pairing),
        }
        is_plain = type(by.ratio) is BetaRatio and by.ratio.beta is None  # which alpha and per_sample say
        others: dict[str, Any] = {"ratio": None if is_plain else by.ratio, "interpolation": by.interpolation}
        others |= {"schedule": by.schedule, "clean_weight": by.clean_weight or None, "targets": by.targets}
        now |= {name: _lasting(value) for name, value in others.items() if value is not None}
        then, self.settings, self.restored = self.restored, now, {}
        shared = [key for key in {**now, **then} if key in then or key in others] if then else []
        changes = [f"{key}={now.get(key)!r} (was {then.get(key)!r})" for key in shared if then.get(key) != now.get(key)]
        if changes:
            rank_zero_warn(f"Manifold mixup resumes with other settings than the checkpoint's: {', '.join(changes)}.")


def check_changeable(by: DrawnBy, num_layers: int | None = None) -> None:
    """Refuse what may change during a fit and is of a wrong type, with TypeError, or value, with ValueError."""
    check_ratio(by.ratio)
    check_schedule(_schedule_of(by), by.ratio)
    way_out = "0 trains on the mixed batch alone."
    check_number("clean_weight", by.clean_weight, "a finite number >= 0", lambda w: 0 <= w < math.inf, way_out)
    check_probability(by.probability)
    if by.seed is not None:
        check_seed(by.seed)
    if by.pairing is not None:
        check_pairing(by.pairing)
    check_weights(by.layer_weights, num_layers, "layer_weights")
    if by.targets is not None and TARGETS not in seen_by(by.pairing or RandomPermutation()) | seen_by(by.ratio):
        raise ValueError(
            f"targets={by.targets!r} is for pairings and ratios that ask for targets, and {by.pairing or by.ratio!r} "
            "does not. Leave it out, or give such a one: pairing=SameClass(), say."
        )


def place_of(trainer: Trainer, batch_index: int, by: DrawnBy) -> dict[str, Any]:
    """A batch's place in training, by which its plan is drawn.

    Raises:
        ValueError: If there is a schedule that was asked for, and no end of training.
    """
    place: dict[str, Any] = {"epoch": trainer.current_epoch, "batch_index": batch_index, "rank": _data_rank(trainer)}
    return place if by.schedule is None else {**place, "progress": _progress(trainer, batch_index, by)}


def shown(value: Any) -> str:
    """An argument's value as it is written: of a class or a function its name."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(getattr(value, "__name__", repr(value)))


def _lasting(value: Any) -> Any:
    """What a value is in a checkpoint, the same in another process."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items()}
    return float(value) if isinstance(value, (int, float)) else re.sub(r" at 0x\w+", "", shown(value))


def _schedule_of(by: DrawnBy) -> ScheduleSpec | None:
    return DEFAULT_SCHEDULE if isinstance(by.schedule, str) and by.schedule == AUTO else by.schedule  # type: ignore[return-value]


def has_end(trainer: Trainer) -> bool:
    """Whether it is known how long training is."""
    return trainer.max_epochs not in (None, -1) or trainer.max_steps not in (None, -1)


def _progress(trainer: Trainer, batch_index: int, by: DrawnBy) -> float:
    """The share of training that lies behind: by epochs or by steps, whichever ends it first."""
    if not has_end(trainer):
        if by.schedule == AUTO:  # which nobody has asked for: the callback warns
            return 0.0
        raise ValueError("schedule needs to know how long training is. Give the Trainer max_epochs or max_steps.")
    batches, shares = trainer.num_training_batches, []
    if trainer.max_epochs not in (None, -1):
        part = batch_index / batches if 0 < batches < math.inf else 0.0
        shares.append((trainer.current_epoch + part) / max(trainer.max_epochs, 1))
    if trainer.max_steps not in (None, -1):
        shares.append(trainer.global_step / max(trainer.max_steps, 1))
    return min(max(shares), 1.0)


def _data_rank(trainer: Trainer) -> int:
    """Which part of the data this process trains on: processes that share a forward pass must share the plan."""
    settings = trainer.distributed_sampler_kwargs or {}
    return int(settings.get("rank", trainer.global_rank))


def _global_seed() -> int:
    """The seed given to ``seed_everything``, which Lightning keeps in the environment for all its processes, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
