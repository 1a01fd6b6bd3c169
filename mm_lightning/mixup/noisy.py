"""HOW? Interpolation with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mm_lightning.arguments import check_number
from mm_lightning.mixup.interpolation import mix_rows
from mm_lightning.mixup.noise import normal, uniform
from mm_lightning.mixup.plan import MixPlan

__all__ = ["NoisyFeatures"]


@dataclass(frozen=True)
class NoisyFeatures:
    """Noisy feature mixup: mixes linearly and adds noise (Lim et al., ICLR 2022).

    ``(1 + mult_noise * b * u) * mixed + add_noise * a * n`` with u evenly in [-1, 1] and n standard normal for each
    number, and a, b ~ Beta(2, 5) for the batch: the noise of equation 4 with the authors' distributions.

    Args:
        add_noise: Largest standard deviation of the additive noise, >= 0.
        mult_noise: Largest part of a number that the multiplicative noise takes away or adds, >= 0.

    Raises:
        ValueError: If a number is negative or not finite.
        TypeError: If one is no number.
    """

    add_noise: float = 0.4
    mult_noise: float = 0.2

    def __post_init__(self) -> None:
        for name in ("add_noise", "mult_noise"):
            level = getattr(self, name)
            check_number(name, level, "a finite number >= 0", lambda level: 0 <= level < math.inf, "0 adds none.")

    def __call__(self, hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        """Mix hidden states.

        Args:
            hidden: Hidden states, floating point, (N, ...).
            plan: The plan.

        Returns:
            Mixed ones with noise, and the plan's ``lam``.
        """
        assert plan.seed is not None
        mixed = mix_rows(hidden, plan)
        shape, device = tuple(hidden.shape), hidden.device
        # The second smallest of six even numbers has the distribution Beta(2, 5).
        strength = uniform(plan.seed, (2, 6), device).sort(dim=1).values[:, 1].to(hidden.dtype)
        if self.mult_noise:
            factor = uniform(plan.seed, shape, device, stream=1).to(hidden.dtype)
            mixed = mixed * (1 + self.mult_noise * strength[1] * (2 * factor - 1))
        if self.add_noise:
            mixed = mixed + self.add_noise * strength[0] * normal(plan.seed, shape, device, stream=2).to(hidden.dtype)
        return mixed, plan.lam
