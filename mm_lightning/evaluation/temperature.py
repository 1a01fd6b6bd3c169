"""Temperature scaling: one number by which logits are divided, so that their softmax is as sure as it is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mm_lightning.arguments import check_number
from mm_lightning.evaluation.rows import check_targets, class_logits

__all__ = ["TemperatureFit", "TemperatureScaling"]

# 95 % quantile of chi-squared with one degree of freedom: what twice the log likelihood may lose within an interval
_CHI_SQUARED = 3.841458820694124
_WIDEST = 2.0  # upper over lower end, beyond which a temperature is called uncertain
_REACH = 60.0  # of log(1 / T) to either side; a factor of 1e26
_STEPS = 200  # at most; Newton takes about six


class TemperatureFit(NamedTuple):
    """What a fit has found."""

    temperature: float
    low: float  # ends of the 95 % interval
    high: float  # infinite where the rows do not tell the logits from noise
    rows: int

    @property
    def is_uncertain(self) -> bool:
        """Whether the upper end is more than twice the lower one."""
        return self.high > _WIDEST * self.low

    def __str__(self) -> str:
        """Say the temperature, and that it is uncertain if it is."""
        text = f"temperature {self.temperature:.4g} (95 % interval {self.low:.4g} to {self.high:.4g}, {self.rows} rows)"
        return f"{text}: uncertain, more validation rows would narrow it" if self.is_uncertain else text


class TemperatureScaling(nn.Module):
    """Divides logits by a temperature T > 0, fitted to validation rows (Guo et al. 2017).

    T > 1 makes a classifier less sure, T < 1 surer; which class is predicted stays. Its ``state_dict`` holds
    ``temperature``, a scalar, and ``interval``, (2,): the ends of the 95 % interval of :meth:`fit`, NaN before. Both
    are float64.

    Args:
        temperature: T to begin with; 1 changes nothing.

    Raises:
        TypeError: If ``temperature`` is no number.
        ValueError: If it is not above zero and finite.

    Example:
        >>> TemperatureScaling(temperature=2.0)(torch.tensor([[2.0, 0.0]]))
        tensor([[1., 0.]])
    """

    temperature: Tensor
    interval: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        is_one = "1 leaves the logits as they are."
        check_number("temperature", temperature, "a finite number > 0", lambda number: 0 < number < math.inf, is_one)
        self.register_buffer("temperature", torch.tensor(float(temperature), dtype=torch.float64))
        self.register_buffer("interval", torch.full((2,), math.nan, dtype=torch.float64))

    def forward(self, logits: Tensor) -> Tensor:
        """Return ``logits / temperature``, with the shape, dtype and device of ``logits``."""
        return logits / self.temperature.to(logits.device)

    @torch.no_grad()
    def fit(self, logits: Tensor, targets: Tensor) -> TemperatureFit:
        """Find the temperature at which the negative log likelihood of the rows is least, in float64.

        With b = 1 / T, the mean of logsumexp(b z) - b z_target is convex in b. It has its minimum at a b > 0 if and
        only if some row is wrong, and the target's logit lies above the mean logit of its row on average. Its
        derivative is zero there, which Newton's method on log b finds in a bracket that it cannot leave.

        The interval is that of the likelihood ratio: all T that a test at 5 % does not tell from the best,
        2 N (nll(T) - nll(best)) <= 3.84. It takes the rows for independent, and need not be symmetric.

        Args:
            logits: Of validation rows, not of training rows: (N, K), or (N,) or (N, 1) for the logit of class 1 of two.
            targets: Class indices, integer, in [0, K), (N,).

        Returns:
            The temperature and its interval, which this module keeps.

        Raises:
            ValueError: If no temperature is the best, or the rows are fewer than two or of one class. The module stays
                as it was.
        """
        z = class_logits(logits.detach(), len(targets)).double()
        targets = targets.detach().to(z.device).long()
        _check(z, targets)
        # only differences to the target's logit matter: nll = logsumexp(b z)
        loss = _Loss(z - z.gather(1, targets[:, None]))
        # the scale of the logits is not known: where the largest difference is 1
        begin = -math.log(loss.z.abs().max().item())
        best = _root(loss.derivative, begin, begin - _REACH, begin + _REACH)
        low, high = loss.interval(best)
        found = TemperatureFit(math.exp(-best), low, high, len(z))
        self.temperature.fill_(found.temperature)
        self.interval.copy_(torch.tensor([low, high], dtype=torch.float64))
        return found


class _Loss:
    """The mean negative log likelihood as a function of u = log(1 / T).

    Args:
        z: Logits minus the target's, (N, K).
    """

    def __init__(self, z: Tensor) -> None:
        if z.mean() >= 0:
            raise ValueError(
                f"No temperature is the best: the logits say nothing of the {len(z)} validation targets, so the "
                "likelihood rises until T is infinite. Do logits and targets belong together?"
            )
        if z.max() <= 0:
            raise ValueError(
                f"No temperature is the best: all {len(z)} validation rows are right, so the likelihood rises until "
                "T = 0. Validate with more rows."
            )
        self.z = z

    def __call__(self, u: float) -> float:
        return (self.z * math.exp(u)).logsumexp(dim=1).mean().item()

    def derivative(self, u: float) -> tuple[float, float]:
        """By 1 / T, and the derivative of that by u."""
        p = (self.z * math.exp(u)).softmax(dim=1)
        mean = (p * self.z).sum(dim=1)
        variance = (p * (self.z - mean[:, None]).square()).sum(dim=1)
        return mean.mean().item(), math.exp(u) * variance.mean().item()

    def interval(self, best: float) -> tuple[float, float]:
        """The temperatures at both ends of the 95 % interval around the best u."""
        least, rows = self(best), len(self.z)

        def excess(u: float) -> tuple[float, float]:
            return 2 * rows * (self(u) - least) - _CHI_SQUARED, 2 * rows * math.exp(u) * self.derivative(u)[0]

        def mirrored(u: float) -> tuple[float, float]:
            value, slope = excess(-u)
            return value, -slope

        low = math.exp(-_root(excess, best, best, best + _REACH))
        # towards T = infinity the loss rises to log K and no further
        is_open = excess(best - _REACH)[0] <= 0
        return low, math.inf if is_open else math.exp(_root(mirrored, -best, -best, -best + _REACH))


def _check(z: Tensor, targets: Tensor) -> None:
    if targets.ndim != 1 or len(targets) < 2:
        raise ValueError(f"targets must be those of two validation rows or more, got shape {tuple(targets.shape)}.")
    check_targets(targets, z.shape[1], may_be_ignored=False)
    if not z.isfinite().all():
        raise ValueError("logits must be finite, got some that are not.")
    if len(targets.unique()) < 2:
        rows, only = len(targets), int(targets[0])
        raise ValueError(f"targets must be of two classes or more, got {rows} validation rows of class {only} alone.")


def _root(function: Callable[[float], tuple[float, float]], begin: float, low: float, high: float) -> float:
    """Where a function, below zero at ``low`` and above at ``high``, is zero: by Newton's method, within the bracket.

    Args:
        function: Returns value and derivative.
        begin: First guess.
        low: Lower end.
        high: Upper end.
    """
    u = begin
    for _ in range(_STEPS):
        value, slope = function(u)
        low, high = (u, high) if value < 0 else (low, u)
        new = u - value / slope if slope > 0 else math.inf
        if not low < new < high:
            step = min(1.0, (high - low) / 2)
            new = low + step if value < 0 else high - step
        if abs(new - u) <= 1e-12 * max(1.0, abs(u)):
            return new
        u = new
    return u
