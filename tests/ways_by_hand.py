"""Every way to mix, by loops written from the papers' equations: what tests hold the package's code against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mm_lightning.mixup import MixPlan, NoisyFeatures, PatchUp, normal, uniform

CPU = torch.device("cpu")
Mixed = tuple[Tensor, list[float]]
"""Mixed rows, and the weight of the row itself in each."""


def lams_of(plan: MixPlan) -> list[float]:
    """As float32 has them, of which the plan is made."""
    return plan.lam.tolist()


def partners_of(plan: MixPlan, hidden: Tensor) -> list[Tensor]:
    """The row mixed into each row."""
    return [hidden[j] for j in plan.partner.tolist()]


def reference_linear(hidden: Tensor, plan: MixPlan) -> Mixed:
    """Verma et al. (2019), equation 1."""
    pairs = zip(hidden, partners_of(plan, hidden), lams_of(plan), strict=True)
    return torch.stack([lam * own + (1 - lam) * other for own, other, lam in pairs]), lams_of(plan)


def reference_boxes(shape: tuple[int, ...], plan: MixPlan, by_row: bool) -> list[list[range]]:
    """Algorithm A1 of Yun et al. (2019) for each row: ``r_w = W sqrt(1 - lam)``, from ``r_x - r_w / 2`` on, clipped.

    In integers as the authors' code has them: ``cut_w = int(W * cut_rat)``, ``clip(cx - cut_w // 2, 0, W)``.
    """
    sides, boxes = shape[2:], []
    lams = lams_of(plan)
    centres = uniform(plan.seed, (len(lams) if by_row else 1, len(sides)), CPU).tolist()
    for i, lam in enumerate(lams):
        box = []
        for side, centre in zip(sides, centres[i if by_row else 0], strict=True):
            cut, middle = int(side * (1 - lam) ** (1 / len(sides)) + 1e-6), int(centre * side)
            box.append(range(max(middle - cut // 2, 0), min(middle + cut // 2, side)))
        boxes.append(box)
    return boxes


def reference_cutmix(hidden: Tensor, plan: MixPlan, by_row: bool = False) -> Mixed:
    """Each row with its box from the partner; the weight is the share of places outside, counted."""
    mixed, weights = [], []
    others = partners_of(plan, hidden)
    for i, box in enumerate(reference_boxes(tuple(hidden.shape), plan, by_row)):
        inside = torch.zeros(hidden.shape[2:], dtype=torch.bool)
        for place in torch.cartesian_prod(*[torch.arange(along.start, max(along.stop, along.start)) for along in box]):
            inside[tuple(place.tolist())] = True
        mixed.append(torch.where(inside, others[i], hidden[i]))
        weights.append(1 - int(inside.sum()) / inside.numel())
    return torch.stack(mixed), weights


def reference_blocks(way: PatchUp, shape: tuple[int, ...], plan: MixPlan) -> Tensor:
    """Which features of (C, H, W) are in a block: Faramarzi et al. (2022), section 2, by loops."""
    _, channels, height, width = shape
    size = next(s for s in range(way.block_size, 0, -1) if s % 2 and s <= min(height, width))
    rate = way.gamma * height * width / (size**2 * (height - size + 1) * (width - size + 1))
    begins = uniform(plan.seed, (channels, height, width), CPU) < rate
    blocks = torch.zeros(channels, height, width, dtype=torch.bool)
    for c, y, x in begins.nonzero().tolist():
        for row in range(max(y - size // 2, 0), min(y + size // 2 + 1, height)):
            for column in range(max(x - size // 2, 0), min(x + size // 2 + 1, width)):
                blocks[c, row, column] = True
    return blocks


def reference_patchup(hidden: Tensor, plan: MixPlan, way: PatchUp) -> Mixed:
    """``M h_i + (1 - M) Mix_lam(h_i, h_j)``, and ``p + (1 - p) lam`` with p the share of M that is 1."""
    blocks = reference_blocks(way, tuple(hidden.shape), plan)
    linear, lams = reference_linear(hidden, plan)
    outside = int((~blocks).sum()) / blocks.numel()
    rows = [torch.where(blocks, mixed, own) for mixed, own in zip(linear, hidden, strict=True)]
    return torch.stack(rows), [outside + (1 - outside) * lam for lam in lams]


def reference_exchanged(places: int, plan: MixPlan) -> list[list[bool]]:
    """For each row which places are the partner's: each with the probability ``1 - lam``, of the same draws."""
    draws = uniform(plan.seed, (places,), CPU).tolist()
    return [[draw >= lam for draw in draws] for lam in lams_of(plan)]


def reference_channels(hidden: Tensor, plan: MixPlan, dim: int) -> Mixed:
    """Each row with places of a dimension from the partner; the weight is the share of the others, counted."""
    mixed, weights, others = [], [], partners_of(plan, hidden)
    for i, taken in enumerate(reference_exchanged(hidden.shape[dim], plan)):
        both = zip(hidden[i].unbind(dim - 1), others[i].unbind(dim - 1), taken, strict=True)
        mixed.append(torch.stack([other if is_other else own for own, other, is_other in both], dim - 1))
        weights.append(1 - sum(taken) / len(taken))
    return torch.stack(mixed), weights


def reference_token_weights(mask: Tensor, plan: MixPlan) -> list[float]:
    """The share of a row's own tokens among its real ones, for a mask (N, T) of real tokens."""
    weights, tokens = [], mask.shape[1]
    for i, taken in enumerate(reference_exchanged(tokens, plan)):
        j = int(plan.partner[i])
        own = sum(bool(mask[i, t]) and not taken[t] for t in range(tokens))
        others = sum(bool(mask[j, t]) and taken[t] for t in range(tokens))
        weights.append(own / (own + others) if own + others else 1 - sum(taken) / tokens)
    return weights


def reference_strengths(plan: MixPlan) -> list[float]:
    """The second smallest of six even numbers is Beta(2, 5): of the additive noise, and of the multiplicative."""
    return [sorted(row)[1] for row in uniform(plan.seed, (2, 6), CPU).tolist()]


def reference_factors(way: NoisyFeatures, plan: MixPlan, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What mixed rows are multiplied with, and what is added."""
    add, mult = reference_strengths(plan)
    even = uniform(plan.seed, shape, CPU, stream=1).double()
    noise = normal(plan.seed, shape, CPU, stream=2).double()
    return 1 + way.mult_noise * mult * (2 * even - 1), way.add_noise * add * noise


def reference_noisy(hidden: Tensor, plan: MixPlan, way: NoisyFeatures) -> Mixed:
    """Lim et al. (2022), equation 4."""
    factor, added = reference_factors(way, plan, tuple(hidden.shape))
    linear, lams = reference_linear(hidden, plan)
    return factor * linear + added, lams


def assert_weights(got: Tensor, wanted: list[float], atol: float = 1e-15) -> None:
    """The weights of rows, within ``atol``."""
    assert got.shape == (len(wanted),)
    for one, other in zip(got.tolist(), wanted, strict=True):
        assert math.isclose(one, other, rel_tol=0, abs_tol=atol)
