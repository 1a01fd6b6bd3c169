import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mm_lightning.mixup import BetaRatio, MixPlan, PlanSource, RandomPermutation, Roll
from mm_lightning.mixup.source import PlansAhead

LAYERS = ("input", "layer1", "layer2")

Drawn = tuple[str | None, list[int], list[float]]


def contents(plan: MixPlan) -> Drawn:
    return plan.layer, plan.partner.tolist(), plan.lam.tolist()


def draws(source: PlanSource, batch_size: int = 16, count: int = 20, **place: int) -> list[Drawn]:
    return [contents(source.draw(batch_size, batch_index=i, **place)) for i in range(count)]


def test_same_arguments_draw_the_same_plan() -> None:
    assert draws(PlanSource(LAYERS, seed=7), epoch=3, rank=2) == draws(PlanSource(LAYERS, seed=7), epoch=3, rank=2)


def test_order_of_calls_makes_no_difference() -> None:
    source = PlanSource(LAYERS, BetaRatio(2.0, per_sample=True), seed=1)
    places = [(epoch, index, rank) for epoch in range(3) for index in range(3) for rank in range(2)]
    forward = {p: contents(source.draw(9, epoch=p[0], batch_index=p[1], rank=p[2])) for p in places}
    backward = {p: contents(source.draw(9, epoch=p[0], batch_index=p[1], rank=p[2])) for p in reversed(places)}
    assert forward == backward


def test_global_random_states_are_neither_read_nor_moved() -> None:
    drawn = []
    for seed in (0, 1):
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        drawn.append(draws(PlanSource(LAYERS, BetaRatio(0.2, per_sample=True), Roll(), probability=0.5)))
        after = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        assert before[0] == after[0]
        assert torch.equal(before[1], after[1])
        assert before[2][2] == after[2][2]
        assert (before[2][1] == after[2][1]).all()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: PlanSource(LAYERS, seed=1).draw(50), id="seed"),
        pytest.param(lambda: PlanSource(LAYERS).draw(50, epoch=1), id="epoch"),
        pytest.param(lambda: PlanSource(LAYERS).draw(50, batch_index=1), id="batch_index"),
        pytest.param(lambda: PlanSource(LAYERS).draw(50, rank=1), id="rank"),
    ],
)
def test_every_coordinate_changes_partners_and_ratio(other: Callable[[], MixPlan]) -> None:
    here, there = PlanSource(LAYERS).draw(50), other()
    assert here.partner.tolist() != there.partner.tolist()
    assert here.lam[0] != there.lam[0]


@pytest.mark.parametrize("coordinate", ["seed", "epoch"])
def test_layers_follow_another_sequence_in_another(coordinate: str) -> None:
    def sequence(value: int) -> list[str | None]:
        seed, epoch = (value, 0) if coordinate == "seed" else (0, value)
        return [layer for layer, *_ in draws(PlanSource(LAYERS, seed=seed), count=60, epoch=epoch)]

    assert sequence(0) != sequence(1)


def test_epoch_and_batch_index_are_not_exchangeable() -> None:
    source = PlanSource(LAYERS)
    assert contents(source.draw(50, epoch=1, batch_index=2)) != contents(source.draw(50, epoch=2, batch_index=1))


def test_ranks_share_the_layer_and_whether_it_mixes_but_not_the_rest() -> None:
    source = PlanSource(LAYERS, probability=0.5)
    ranks = [draws(source, batch_size=50, count=60, rank=rank) for rank in (0, 1, 13)]
    layers = [[layer for layer, *_ in drawn] for drawn in ranks]
    assert layers[0] == layers[1] == layers[2]
    assert None in layers[0]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for (layer, partner, lam), (_, other_partner, other_lam) in zip(ranks[first], ranks[second], strict=True):
            if layer is not None:
                assert partner != other_partner
                assert lam[0] != other_lam[0]


def test_ranks_with_other_batch_sizes_share_the_layer() -> None:
    source = PlanSource(LAYERS, probability=0.5)
    small, large = (draws(source, batch_size=size, count=60, rank=rank) for rank, size in enumerate((2, 64)))
    assert [layer for layer, *_ in small] == [layer for layer, *_ in large]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        pytest.param(None, (1 / 3, 1 / 3, 1 / 3), id="uniform"),
        pytest.param((1, 2, 5), (1 / 8, 2 / 8, 5 / 8), id="weighted"),
        pytest.param((0.0, 0.3, 0.1), (0.0, 0.75, 0.25), id="first_is_zero"),
        pytest.param((3.0, 0.0, 1.0), (0.75, 0.0, 0.25), id="middle_is_zero"),
        pytest.param((0.5, 0.5, 0.0), (0.5, 0.5, 0.0), id="last_is_zero"),
    ],
)
def test_layers_are_drawn_with_their_weights(weights: Any, expected: tuple[float, ...]) -> None:
    source, num_draws = PlanSource(LAYERS, weights=weights), 4000
    counts = Counter(source.draw(2, batch_index=i).layer for i in range(num_draws))
    for layer, share in zip(LAYERS, expected, strict=True):
        standard_error = math.sqrt(share * (1 - share) * num_draws)
        assert abs(counts[layer] - share * num_draws) <= 4 * standard_error, layer  # a share of 0 is never drawn


@pytest.mark.parametrize("weights", [None, (1, 2, 5)], ids=["uniform", "weighted"])
def test_ratio_has_one_mean_and_spread_whatever_the_layer(weights: Any) -> None:
    source, lams = PlanSource(LAYERS, ratio=BetaRatio(1.0), weights=weights), {layer: [] for layer in LAYERS}
    for i in range(4000):
        plan = source.draw(2, batch_index=i)
        lams[plan.layer].append(float(plan.lam[0]))
    for layer, drawn in lams.items():  # of Beta(1, 1): mean 1/2, variance 1/12, fourth moment about the mean 1/80
        assert abs(np.mean(drawn) - 1 / 2) <= 4 * math.sqrt(1 / 12 / len(drawn)), layer
        error = math.sqrt((1 / 80 - (1 / 12) ** 2) / len(drawn))
        assert abs(np.mean((np.array(drawn) - 1 / 2) ** 2) - 1 / 12) <= 4 * error, layer


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_one_row_with_a_ratio_of_exactly_one_leaves_the_others_mixed(place: int) -> None:
    lam = np.full(3, 0.25)
    lam[place] = 1.0
    plan = PlanSource(["only"], ratio=lambda rng, batch_size: lam, pairing=Roll()).draw(3)
    assert plan.mixes
    assert plan.lam.tolist() == lam.tolist()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probability_is_the_share_of_mixed_batches(probability: float) -> None:
    source, num_draws = PlanSource(LAYERS, probability=probability), 3000
    mixed = sum(source.draw(2, batch_index=i).mixes for i in range(num_draws))
    standard_error = math.sqrt(probability * (1 - probability) * num_draws)
    assert abs(mixed - probability * num_draws) <= 4 * standard_error  # 0 and 1 leave no room


@pytest.mark.parametrize(
    ("source", "batch_size"),
    [
        pytest.param(PlanSource(LAYERS), 1, id="one_row"),
        pytest.param(PlanSource(LAYERS, BetaRatio(0.0)), 5, id="alpha_0"),
        pytest.param(PlanSource(LAYERS, BetaRatio(0.0, per_sample=True)), 5, id="alpha_0_per_sample"),
        pytest.param(PlanSource(LAYERS, probability=0.0), 5, id="probability_0"),
    ],
)
def test_unmixed_plan_pairs_every_row_with_itself(source: PlanSource, batch_size: int) -> None:
    plan = source.draw(batch_size)
    assert contents(plan) == (None, list(range(batch_size)), [1.0] * batch_size)
    assert not plan.mixes
    assert plan.batch_size == batch_size


@pytest.mark.parametrize("batch_size", [2, 3, 7, 100])
def test_ratio_per_batch_is_one_number_in_every_row(batch_size: int) -> None:
    plan = PlanSource(LAYERS).draw(batch_size)
    assert plan.mixes
    assert plan.lam.shape == (batch_size,)
    assert plan.lam.dtype == torch.float32
    assert plan.lam.stride() == (0,)
    assert 0 < plan.lam[0] < 1


def test_ratio_per_sample_is_a_number_a_row() -> None:
    lam = PlanSource(LAYERS, BetaRatio(2.0, per_sample=True)).draw(50).lam
    assert lam.shape == (50,)
    assert lam.dtype == torch.float32
    assert len(set(lam.tolist())) == 50


@pytest.mark.parametrize("pairing", [RandomPermutation(), Roll()], ids=["permutation", "roll"])
@pytest.mark.parametrize("batch_size", [2, 3, 7, 100])
def test_inverse_is_the_row_that_each_row_is_mixed_into(pairing: Any, batch_size: int) -> None:
    plan = PlanSource(LAYERS, pairing=pairing).draw(batch_size)
    assert plan.partner.dtype == plan.inverse.dtype == torch.int64
    for row in range(batch_size):
        assert plan.inverse[plan.partner[row]] == row
        assert plan.partner[plan.inverse[row]] == row


def test_largest_seed_is_a_seed_of_its_own() -> None:
    largest, next_to_it, zero = (draws(PlanSource(LAYERS, seed=seed)) for seed in (2**64 - 1, 2**64 - 2, 0))
    assert largest == draws(PlanSource(LAYERS, seed=2**64 - 1))
    assert largest != next_to_it
    assert largest != zero


def test_pairing_that_repeats_rows_has_no_inverse() -> None:
    plan = PlanSource(LAYERS, pairing=lambda rng, batch_size: np.array([0, 0, 2, 1])).draw(4)
    assert plan.partner.tolist() == [0, 0, 2, 1]
    assert plan.inverse is None


def test_ratio_and_pairing_are_given_the_batch_size() -> None:
    sizes = []

    def ratio(rng: np.random.Generator, batch_size: int) -> np.ndarray:
        sizes.append(batch_size)
        return np.full(1, 0.25)

    def pairing(rng: np.random.Generator, batch_size: int) -> np.ndarray:
        sizes.append(batch_size)
        return (np.arange(batch_size) + 1) % batch_size

    plan = PlanSource(["only"], ratio, pairing).draw(5)
    assert sizes == [5, 5]
    assert contents(plan) == ("only", [1, 2, 3, 4, 0], [0.25] * 5)


def test_pairing_may_return_a_view() -> None:
    plan = PlanSource(LAYERS, pairing=lambda rng, batch_size: np.arange(batch_size)[::-1]).draw(5)
    assert plan.partner.tolist() == plan.inverse.tolist() == [4, 3, 2, 1, 0]


def test_plan_shares_no_memory_with_its_pairing() -> None:
    kept = np.array([1, 2, 0])
    plan = PlanSource(LAYERS, pairing=lambda rng, batch_size: kept).draw(3)
    kept[:] = 0
    assert plan.partner.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "partner",
    [
        pytest.param([1, 2, 3, 4], id="above"),
        pytest.param([-1, 0, 1, 2], id="below"),
        pytest.param([0, 1, 2], id="too_few"),
        pytest.param([[0], [1], [2], [3]], id="a_column"),
    ],
)
def test_pairing_that_draws_no_rows_of_the_batch_is_refused(partner: list[Any]) -> None:
    source = PlanSource(LAYERS, pairing=lambda rng, batch_size: np.array(partner))
    with pytest.raises(ValueError, match=r"must draw one row in 0 \.\.\. 3 for each of the rows"):
        source.draw(4)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_without_rows_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"^batch_size must be an integer >= 1, got {batch_size}\\."):
        PlanSource(LAYERS).draw(batch_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"layers": ()}, r"at least one layer name, got \(\)", id="layers_empty"),
        pytest.param({"weights": (1.0, 2.0)}, "one number for each of the 3 eligible layers", id="weights_too_few"),
        pytest.param({"weights": (1.0, -1.0, 1.0)}, "finite, >= 0 and not all zero", id="weights_negative"),
        pytest.param({"weights": (1.0, math.nan, 1.0)}, "finite, >= 0 and not all zero", id="weights_nan"),
        pytest.param({"weights": (1.0, math.inf, 1.0)}, "finite, >= 0 and not all zero", id="weights_inf"),
        pytest.param({"weights": (0.0, 0.0, 0.0)}, "finite, >= 0 and not all zero", id="weights_zero"),
        pytest.param({"probability": -0.1}, r"in \[0, 1\], got -0.1. 0 switches mixing off", id="probability_below"),
        pytest.param({"probability": 1.1}, r"in \[0, 1\], got 1.1", id="probability_above"),
        pytest.param({"probability": math.nan}, r"in \[0, 1\], got nan", id="probability_nan"),
        pytest.param({"seed": -1}, r"integer in \[0, 2\*\*64\), got -1", id="seed_negative"),
        pytest.param({"seed": 2**64}, r"integer in \[0, 2\*\*64\), got 18446744073709551616", id="seed_large"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must .*{message}"):
        PlanSource(**{"layers": LAYERS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "first"}, "a sequence of layer names, got 'first' of type str. Give for example ['input']."),
        ({"layers": 3}, "a sequence of layer names, got 3 of type int. Give for example ['input']."),
        ({"layers": ["a", 3]}, "a sequence of layer names, got ['a', 3] of type list. Give for example ['input']."),
        ({"seed": True}, "an integer in [0, 2**64), got True of type bool. Give 0, for example."),
        ({"seed": 1.5}, "an integer in [0, 2**64), got 1.5 of type float. Give 0, for example."),
        ({"probability": "1"}, "a number in [0, 1], got '1' of type str. 0 switches mixing off."),
        (
            {"weights": "abc"},
            "one number for each of the 3 eligible layers, got 'abc' of type str. None draws all layers alike.",
        ),
        (
            {"ratio": BetaRatio},
            "a function of a numpy.random.Generator and the number of rows, got <class "
            "'mm_lightning.mixup.ratio.BetaRatio'> of type type. Give BetaRatio(alpha).",
        ),
        (
            {"ratio": 0.5},
            "a function of a numpy.random.Generator and the number of rows, got 0.5 of type float. "
            "Give BetaRatio(alpha).",
        ),
        (
            {"pairing": "roll"},
            "a function of a numpy.random.Generator and the number of rows, got 'roll' of type str. "
            "Give RandomPermutation() or Roll().",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as refusal:
        PlanSource(**{"layers": LAYERS, **arguments})
    assert str(refusal.value) == f"{next(iter(arguments))} must be {message}"


@pytest.mark.parametrize(
    ("place", "error", "got"),
    [
        ({"epoch": 1.5}, TypeError, "1.5 of type float"),
        ({"batch_index": "0"}, TypeError, "'0' of type str"),
        ({"rank": -1}, ValueError, "-1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_place_that_is_none_is_refused(place: dict[str, Any], error: type[Exception], got: str) -> None:
    with pytest.raises(error) as refusal:
        PlanSource(LAYERS).draw(4, **place)
    assert str(refusal.value) == f"{next(iter(place))} must be an integer in [0, 2**64), got {got}. Count from 0."


def test_weights_of_an_array_are_those_of_a_list() -> None:
    one, other = (PlanSource(LAYERS, weights=w, seed=1) for w in ([1.0, 0.0, 2.0], np.array([1, 0, 2], np.float32)))
    drawn = [[source.draw(4, epoch=epoch).layer for epoch in range(20)] for source in (one, other)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {LAYERS[0], LAYERS[2]}


# --- drawn ahead


@pytest.mark.parametrize("count", [1, 2, 5])
def test_plans_drawn_ahead_are_the_source_s(count: int) -> None:
    source = PlanSource(LAYERS, probability=0.7, seed=3)
    ahead = PlansAhead(source, count)
    # An epoch with a smaller last batch, the next one on another rank, one that is resumed, and one backwards.
    places = [(8, 0, i, 0) for i in range(7)] + [(3, 0, 7, 0)] + [(8, 1, i, 1) for i in range(7)]
    places += [(8, 2, i, 1) for i in range(4, 9)] + [(5, 2, i, 1) for i in (3, 2, 1, 0, 0)]
    for size, epoch, index, rank in places:
        place = {"epoch": epoch, "batch_index": index, "rank": rank}
        assert contents(ahead.draw(size, **place)) == contents(source.draw(size, **place))


def test_plans_are_drawn_ahead_once_two_batches_have_one_size() -> None:
    drawn: list[int] = []

    def pairing(rng: np.random.Generator, batch_size: int) -> np.ndarray:
        drawn.append(batch_size)
        return np.arange(batch_size)

    ahead = PlansAhead(PlanSource(LAYERS, pairing=pairing), count=4)
    counts = []
    for index, size in enumerate([9, 9, 9, 9, 9, 9, 5, 6]):
        ahead.draw(size, batch_index=index)
        counts.append(len(drawn))
    assert counts == [1, 5, 5, 5, 5, 9, 10, 11]


def test_plan_asked_for_again_is_another_object() -> None:
    ahead = PlansAhead(PlanSource(LAYERS))
    first, again, third = (ahead.draw(4) for _ in range(3))
    assert contents(first) == contents(again) == contents(third)
    assert first is not again
    assert again is not third


@pytest.mark.parametrize("progress", [None, -0.1, 1.1])
def test_a_schedule_needs_the_share_of_training(progress: float | None) -> None:
    expected = r"^A schedule needs the share" if progress is None else r"^progress must be a number in \[0, 1\], got"
    with pytest.raises(ValueError, match=expected):
        PlanSource(LAYERS, schedule=lambda progress: 1.0).draw(4, progress=progress)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'bacth_index'"):
        PlanSource(LAYERS).draw(4, bacth_index=1)  # type: ignore[call-arg]
