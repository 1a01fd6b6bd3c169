"""WHEN? How strongly is mixed, as training goes on: factors of alpha, of the probability and of layers' weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mm_lightning.arguments import check_number, no_such, plain, refusal
from mm_lightning.mixup.ratio import Ratio, alpha_of

__all__ = [
    "DEFAULT_SCHEDULE",
    "Alternating",
    "Constant",
    "CosineSchedule",
    "LinearSchedule",
    "Progress",
    "Schedule",
    "ScheduleSpec",
    "Until",
    "WarmUp",
    "check_schedule",
]

Curve = Callable[[Any], Any]
ScheduleSpec = Curve | Mapping[str, Curve]

ALPHA, PROBABILITY = "alpha", "probability"


class Progress(float):
    """How far training has come: the share of all steps that lies behind, in [0, 1].

    Attributes:
        epoch: The epoch, from 0.
        batch_index: Index of the batch in its epoch, from 0.
    """

    epoch: int
    batch_index: int

    def __new__(cls, share: float, epoch: int = 0, batch_index: int = 0) -> Progress:
        """Make one of a share in [0, 1]."""
        progress = super().__new__(cls, share)
        progress.epoch, progress.batch_index = epoch, batch_index
        return progress


@dataclass(frozen=True)
class Constant:
    """The same factor all the time.

    Args:
        factor: >= 0.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_factor("factor", self.factor)

    def __call__(self, progress: float) -> float:
        """Return the factor at a share of training."""
        return self.factor


@dataclass(frozen=True)
class _FromTo:
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_factor("start", self.start)
        _check_factor("end", self.end)


class LinearSchedule(_FromTo):
    """A factor that moves in a straight line from the first step to the last.

    Args:
        start: At the first step, >= 0.
        end: At the last, >= 0.
    """

    def __call__(self, progress: float) -> float:
        """Return the factor at a share of training."""
        return self.start + (self.end - self.start) * progress


class CosineSchedule(_FromTo):
    """A factor that moves along half a cosine: slowly at first and at last.

    Args:
        start: At the first step, >= 0.
        end: At the last, >= 0.
    """

    def __call__(self, progress: float) -> float:
        """Return the factor at a share of training."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WarmUp:
    """A factor that grows from 0 to 1 in the first part of training, and stays there.

    Args:
        until: Share of training after which it is 1, in (0, 1].
    """

    until: float = 0.1

    def __post_init__(self) -> None:
        _check_share("until", self.until)

    def __call__(self, progress: float) -> float:
        """Return the factor at a share of training."""
        return min(progress / self.until, 1.0)


@dataclass(frozen=True)
class Until:
    """1 in the first part of training and 0 in the rest, which trains on unmixed data.

    Args:
        end: Share of training after which nothing is mixed, in (0, 1].
    """

    end: float = 0.8

    def __post_init__(self) -> None:
        _check_share("end", self.end)

    def __call__(self, progress: float) -> float:
        """Return the factor at a share of training."""
        return float(progress < self.end)


@dataclass(frozen=True)
class Alternating:
    """Mixes always, then in every second epoch, then ever less often (Yu et al., 2021, "mixup without hesitation").

    Up to ``alternate`` it is 1; up to ``fade`` 1 in even epochs and 0 in odd ones; then it falls from 1 to 0 in a
    straight line. As a factor of the probability that is the paper's algorithm.

    Args:
        alternate: Share of training after which epochs alternate, in (0, 1].
        fade: Share of training after which it fades out, in [alternate, 1].
    """

    alternate: float = 0.6
    fade: float = 0.9

    def __post_init__(self) -> None:
        _check_share("alternate", self.alternate)
        way_out = "0.9 is the paper's."
        check_number("fade", self.fade, "a number in [alternate, 1]", lambda n: self.alternate <= n <= 1, way_out)

    def __call__(self, progress: Progress) -> float:
        """Return the factor at a share of training."""
        if progress < self.alternate:
            return 1.0
        if progress < self.fade:
            return float(progress.epoch % 2 == 0)
        return (1 - progress) / (1 - self.fade) if self.fade < 1 else 0.0


class Schedule:
    """Factors of alpha, of the probability and of layers' weights, as functions of progress.

    Args:
        spec: A function of progress that gives the factor of the probability; or such functions by what they are of,
            ``"alpha"``, ``"probability"`` or a layer's name.
        layers: Names of the eligible layers.

    Raises:
        ValueError: If a name is none of these.
    """

    def __init__(self, spec: ScheduleSpec | None, layers: Sequence[str]) -> None:
        self.curves: dict[str, Curve] = _by_name(spec)
        for name in self.curves:
            if name not in (ALPHA, PROBABILITY, *layers):
                raise ValueError(no_such(name, (ALPHA, PROBABILITY, *layers), "quantity or eligible layer to schedule"))
        self.layers = tuple(layers)

    @property
    def has_alpha(self) -> bool:
        """Whether alpha changes."""
        return ALPHA in self.curves

    def alpha(self, progress: Progress) -> float:
        """Factor of alpha."""
        return self._factor(ALPHA, progress)

    def probability(self, probability: float, progress: Progress) -> float:
        """The probability, times its factor.

        Raises:
            ValueError: If that is more than 1.
        """
        value = probability * self._factor(PROBABILITY, progress)
        if value > 1:
            raise ValueError(
                f"The schedule makes the probability {value:.6g} at {float(progress):.0%} of training, which is more "
                "than 1. Let its factor be at most 1, or set a smaller probability."
            )
        return value

    def weights(self, weights: Sequence[float] | None, progress: Progress) -> Sequence[float] | None:
        """Weights of the layers, times their factors; None if all are alike."""
        if self.curves.keys().isdisjoint(self.layers):
            return weights
        given = [1.0] * len(self.layers) if weights is None else weights
        return [w * self._factor(name, progress) for name, w in zip(self.layers, given, strict=True)]

    def _factor(self, name: str, progress: Progress) -> float:
        curve = self.curves.get(name)
        if curve is None:
            return 1.0
        factor = curve(progress)
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 <= float(factor) < math.inf:
            raise ValueError(
                f"The schedule of {name} must give a finite number >= 0, got {factor!r} at {float(progress):.0%} of "
                "training. It is a factor: 1 changes nothing, 0 switches off."
            )
        return float(factor)


def check_schedule(spec: Any, ratio: Ratio | None = None) -> None:
    """Refuse what is no schedule.

    Args:
        spec: None, a function of progress, or a mapping of names to such functions.
        ratio: Whose alpha it may be of, where that is known.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is of alpha, and the ratio has none.
    """
    expected = "a function of the progress of training, or a dict of such functions"
    for curve in _by_name(spec).values() if isinstance(plain(spec), dict) else [spec]:
        if curve is not None and (isinstance(curve, type) or not callable(curve)):
            raise refusal("schedule", curve, expected, "Give Until(0.8), say; None changes nothing.")
    if ratio is not None and ALPHA in _by_name(spec) and alpha_of(ratio) is None:
        raise ValueError(f"schedule is of alpha, but the ratio {ratio!r} has none. Give BetaRatio(alpha).")


def _by_name(spec: Any) -> dict[str, Curve]:
    given = plain(spec)
    return given if isinstance(given, dict) else {} if given is None else {PROBABILITY: given}


def _check_factor(name: str, value: Any) -> None:
    check_number(name, value, "a finite number >= 0", lambda factor: 0 <= factor < math.inf, "1 changes nothing.")


def _check_share(name: str, value: Any) -> None:
    check_number(name, value, "a number in (0, 1]", lambda share: 0 < share <= 1, "1 is the end of training.")


DEFAULT_SCHEDULE = Until(0.8)  # what schedule="auto" of the callback is; chosen by docs/evidence.md
