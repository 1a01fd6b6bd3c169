"""WHEN: curves at points worked out by hand, and what a schedule makes of a source's settings."""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from mm_lightning.mixup import (
    Alternating,
    BetaRatio,
    Constant,
    CosineSchedule,
    FixedRatio,
    FoldedRatio,
    LinearSchedule,
    MixPlan,
    PlanSource,
    Progress,
    RandomPermutation,
    SameClass,
    UniformRatio,
    Until,
    WarmUp,
)
from mm_lightning.mixup.schedule import Schedule, check_schedule

HALF_ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (Constant(0.25), {0.0: 0.25, 0.5: 0.25, 1.0: 0.25}),
        (LinearSchedule(), {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        (LinearSchedule(0.5, 2.0), {0.0: 0.5, 0.5: 1.25, 1.0: 2.0}),
        (CosineSchedule(), {0.0: 1.0, 0.25: (1 + HALF_ROOT) / 2, 0.5: 0.5, 0.75: (1 - HALF_ROOT) / 2, 1.0: 0.0}),
        (CosineSchedule(0.0, 4.0), {0.0: 0.0, 0.25: 2 - 2 * HALF_ROOT, 0.5: 2.0, 1.0: 4.0}),
        (WarmUp(0.2), {0.0: 0.0, 0.05: 0.25, 0.1: 0.5, 0.2: 1.0, 0.7: 1.0, 1.0: 1.0}),
        (Until(0.8), {0.0: 1.0, 0.799: 1.0, 0.8: 0.0, 1.0: 0.0}),
        (Until(1.0), {0.0: 1.0, 0.999: 1.0, 1.0: 0.0}),
        (Alternating(0.5, 0.75), {0.0: 1.0, 0.49: 1.0, 0.75: 1.0, 0.875: 0.5, 1.0: 0.0}),
        (Alternating(0.5, 1.0), {0.0: 1.0, 1.0: 0.0}),
    ],
    ids=repr,
)
def test_curve_by_hand(curve: Any, expected: dict[float, float]) -> None:
    assert {share: curve(Progress(share)) for share in expected} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1.0), (4, 1.0), (5, 0.0), (6, 1.0), (7, 0.0)])
def test_every_second_epoch_is_mixed_while_alternating(epoch: int, factor: float) -> None:
    curve = Alternating(0.6, 0.9)
    assert curve(Progress(0.6, epoch)) == curve(Progress(0.89, epoch, batch_index=3)) == factor
    assert curve(Progress(0.59, epoch)) == 1.0


def test_fading_begins_at_the_probability_one() -> None:
    """Yu et al. (2021), algorithm 1: in the last stage the probability falls from 1 to 0 in a straight line."""
    curve = Alternating(0.5, 0.8)
    assert [curve(Progress(0.8 + 0.2 * part, epoch=1)) for part in (0, 0.25, 1)] == pytest.approx([1, 0.75, 0])


def test_progress_is_a_number_with_a_place() -> None:
    progress = Progress(0.5, epoch=3, batch_index=7)
    assert (progress, progress.epoch, progress.batch_index) == (0.5, 3, 7)
    assert isinstance(progress, float)


def test_factors_are_those_of_what_they_are_named_for() -> None:
    schedule = Schedule({"alpha": Constant(3.0), "probability": Constant(0.5), "b": LinearSchedule()}, ["a", "b"])
    now = Progress(0.25)
    assert schedule.has_alpha
    assert schedule.alpha(now) == 3.0
    assert schedule.probability(0.5, now) == 0.25
    assert schedule.weights(None, now) == [1.0, 0.75]
    assert schedule.weights([2.0, 4.0], now) == [2.0, 3.0]


def test_a_curve_alone_is_of_the_probability() -> None:
    schedule = Schedule(Constant(0.5), ["a", "b"])
    assert not schedule.has_alpha
    assert (schedule.alpha(Progress(0)), schedule.probability(1.0, Progress(0))) == (1.0, 0.5)
    assert schedule.weights(None, Progress(0)) is None
    assert schedule.weights([1.0, 2.0], Progress(0)) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(-1), ValueError, "factor must be a finite number >= 0, got -1. 1 changes nothing."),
        (
            lambda: LinearSchedule(start=math.inf),
            ValueError,
            "start must be a finite number >= 0, got inf. 1 changes nothing.",
        ),
        (
            lambda: CosineSchedule(end="0"),  # type: ignore[arg-type]
            TypeError,
            "end must be a finite number >= 0, got '0' of type str. 1 changes nothing.",
        ),
        (lambda: WarmUp(0), ValueError, "until must be a number in (0, 1], got 0. 1 is the end of training."),
        (lambda: Until(1.5), ValueError, "end must be a number in (0, 1], got 1.5. 1 is the end of training."),
        (lambda: Until(80), ValueError, "end must be a number in (0, 1], got 80. 1 is the end of training."),
        (
            lambda: Alternating(0.6, 0.5),
            ValueError,
            "fade must be a number in [alternate, 1], got 0.5. 0.9 is the paper's.",
        ),
        (
            lambda: check_schedule(Until),
            TypeError,
            "schedule must be a function of the progress of training, or a dict of such functions, got "
            f"{Until!r} of type type. Give Until(0.8), say; None changes nothing.",
        ),
        (
            lambda: check_schedule({"alpha": 0.5}),
            TypeError,
            "schedule must be a function of the progress of training, or a dict of such functions, got 0.5 of type "
            "float. Give Until(0.8), say; None changes nothing.",
        ),
        (
            lambda: check_schedule("until"),
            TypeError,
            "schedule must be a function of the progress of training, or a dict of such functions, got 'until' of "
            "type str. Give Until(0.8), say; None changes nothing.",
        ),
        (
            lambda: PlanSource(["first"], schedule={"frist": Until()}),
            ValueError,
            "There is no quantity or eligible layer to schedule 'frist'. Did you mean 'first'?",
        ),
        (
            lambda: PlanSource(["first"], UniformRatio(), schedule={"alpha": Until()}),
            ValueError,
            f"schedule is of alpha, but the ratio {UniformRatio()!r} has none. Give BetaRatio(alpha).",
        ),
    ],
    ids=[
        "negative",
        "infinite",
        "string",
        "no_warm_up",
        "until",
        "percent",
        "fade",
        "class",
        "number",
        "name",
        "unknown",
        "alpha",
    ],
)
def test_settings_that_are_none_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        make()
    assert str(refusal.value) == message


@pytest.mark.parametrize("factor", [-0.5, math.nan, math.inf, None, "1", True], ids=repr)
@pytest.mark.parametrize("name", ["alpha", "probability", "a"])
def test_a_factor_that_is_none_is_refused_when_it_is_used(name: str, factor: Any) -> None:
    source = PlanSource(["a", "b"], schedule={name: lambda progress: factor})
    message = (
        f"The schedule of {name} must give a finite number >= 0, got {factor!r} at 25% of training. It is a factor: 1 "
        "changes nothing, 0 switches off."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        source.draw(4, progress=0.25)


def test_a_probability_of_more_than_one_is_refused_when_it_is_used() -> None:
    source = PlanSource(["a"], probability=0.5, schedule=Constant(4))
    message = (
        "The schedule makes the probability 2 at 25% of training, which is more than 1. Let its factor be at most 1, "
        "or set a smaller probability."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        source.draw(4, progress=0.25)


def draws(source: PlanSource, progress: float, count: int = 400, **place: Any) -> list[MixPlan]:
    return [source.draw(4, batch_index=i, progress=progress, **place) for i in range(count)]


def test_probability_follows_its_schedule() -> None:
    source = PlanSource(["a"], probability=0.8, schedule=LinearSchedule())
    for progress, share in ((0.0, 0.8), (0.5, 0.4), (1.0, 0.0)):
        mixed = sum(plan.mixes for plan in draws(source, progress, 1000)) / 1000
        assert abs(mixed - share) <= 4 * math.sqrt(share * (1 - share) / 1000)


def test_layers_follow_their_schedules() -> None:
    source = PlanSource(["a", "b"], weights=[1, 3], schedule={"b": LinearSchedule()})
    for progress, share in ((0.0, 1 / 4), (2 / 3, 1 / 2), (1.0, 1.0)):
        drawn = Counter(plan.layer for plan in draws(source, progress, 1000))
        assert abs(drawn["a"] / 1000 - share) <= 4 * math.sqrt(share * (1 - share) / 1000)


def test_batches_stay_unmixed_while_all_layers_are_switched_off() -> None:
    source = PlanSource(["a", "b"], schedule={"a": Until(0.5), "b": Until(0.5)})
    assert all(plan.mixes for plan in draws(source, 0.49, 20))
    assert not any(plan.mixes for plan in draws(source, 0.5, 20))


@pytest.mark.parametrize("fold", [False, True], ids=["beta", "folded"])
def test_alpha_follows_its_schedule_with_the_same_numbers(fold: bool) -> None:
    def ratio(alpha: float) -> Any:
        return FoldedRatio(BetaRatio(alpha)) if fold else BetaRatio(alpha)

    source = PlanSource(["a"], ratio(2.0), seed=7, schedule={"alpha": LinearSchedule()})
    for progress, alpha in ((0.0, 2.0), (0.75, 0.5)):
        plain = PlanSource(["a"], ratio(alpha), seed=7)
        for got, wanted in zip(draws(source, progress, 20), draws(plain, 0.0, 20), strict=True):
            assert got.shared_lam == wanted.shared_lam
            assert torch.equal(got.partner, wanted.partner)
    assert not any(plan.mixes for plan in draws(source, 1.0, 20))  # alpha = 0


def test_plans_are_a_pure_function_of_progress_place_and_rank() -> None:
    schedule = {"alpha": CosineSchedule(), "probability": Alternating(), "a": WarmUp()}
    source, other = (PlanSource(["a", "b"], BetaRatio(1.0), seed=3, schedule=schedule) for _ in range(2))
    places = [(e, b, r, (4 * e + b) / 24) for e in range(6) for b in range(4) for r in range(2)]

    def drawn(source: PlanSource, place: tuple[int, int, int, float]) -> tuple[Any, ...]:
        epoch, batch_index, rank, progress = place
        plan = source.draw(5, epoch=epoch, batch_index=batch_index, rank=rank, progress=progress)
        return plan.layer, plan.partner.tolist(), plan.lam.tolist()

    straight = {place: drawn(source, place) for place in places}
    assert {place: drawn(other, place) for place in reversed(places)} == straight
    own, others = ([straight[place] for place in places if place[2] == rank] for rank in (0, 1))
    assert [plan[0] for plan in own] == [plan[0] for plan in others]  # ranks share the layer
    assert len({plan[0] for plan in own}) == 3
    assert sum(a[1] != b[1] for a, b in zip(own, others, strict=True)) > 8


def test_a_schedule_that_changes_nothing_draws_the_same_plans() -> None:
    plain = PlanSource(["a", "b"], BetaRatio(1.0), weights=[1, 1], seed=3)
    scheduled = replace(plain, schedule={"alpha": Constant(), "probability": Constant(), "a": Constant()})
    for got, wanted in zip(draws(scheduled, 0.3, 50), draws(plain, 0.3, 50), strict=True):
        assert (got.layer, got.shared_lam) == (wanted.layer, wanted.shared_lam)
        assert torch.equal(got.partner, wanted.partner)


@pytest.mark.parametrize(
    "curve", [Constant(0.5), LinearSchedule(), CosineSchedule(), WarmUp(), Until(), Alternating()], ids=repr
)
def test_repr_is_the_call_that_makes_it(curve: Any) -> None:
    assert eval(repr(curve)) == pickle.loads(pickle.dumps(curve)) == curve


@pytest.mark.parametrize(
    "ratio",
    [BetaRatio(0), BetaRatio(0, True), FixedRatio(1), UniformRatio(1), FoldedRatio(FixedRatio(0))],
    ids=["alpha", "alpha_by_row", "fixed", "uniform", "folded"],
)
@pytest.mark.parametrize("pairing", [RandomPermutation(), SameClass()], ids=["random", "same_class"])
def test_a_ratio_that_is_always_one_leaves_every_batch_unmixed(ratio: Any, pairing: Any) -> None:
    assert not any(plan.mixes for plan in draws(PlanSource(["a"], ratio, pairing), 0.0, 10))


def test_ranks_mix_the_same_batches_though_lam_is_one_on_some_by_chance() -> None:
    source = PlanSource(["a"], BetaRatio(0.003))
    plans = [draws(source, 0.0, 200, rank=rank) for rank in (0, 1)]
    assert sum((a.shared_lam == 1) != (b.shared_lam == 1) for a, b in zip(*plans, strict=True)) > 50
    assert all(plan.mixes for plan in plans[0] + plans[1])
