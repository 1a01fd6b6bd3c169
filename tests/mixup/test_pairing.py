import itertools
import math
import pickle
import random
import re
import sys
from collections import Counter, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm_lightning.mixup import (
    ConfidentWithUnconfident,
    FixedRatio,
    FromBatch,
    LabelDistance,
    MatchedGroups,
    NearestNeighbors,
    OtherClass,
    PlanSource,
    RandomPermutation,
    Roll,
    SameClass,
)
from mm_lightning.mixup.pairing import check_pairing

SIZES = (1, 2, 3, 7, 100)


@pytest.mark.parametrize("pairing", [RandomPermutation(), Roll()], ids=["permutation", "roll"])
@pytest.mark.parametrize("batch_size", SIZES)
def test_partners_are_a_permutation_of_the_batch(pairing: RandomPermutation | Roll, batch_size: int) -> None:
    for seed in range(20):
        partner = pairing(np.random.default_rng(seed), batch_size)
        assert partner.dtype == np.int64
        assert sorted(partner.tolist()) == list(range(batch_size))


@pytest.mark.parametrize("batch_size", SIZES[1:])
def test_roll_never_pairs_a_row_with_itself(batch_size: int) -> None:
    rows = np.arange(batch_size)
    for seed in range(200):
        assert (Roll()(np.random.default_rng(seed), batch_size) != rows).all()


def test_roll_draws_every_shift_equally_often() -> None:
    rng, num_draws = np.random.default_rng(0), 3000
    counts = np.bincount([Roll()(rng, 4)[0] for _ in range(num_draws)], minlength=4)
    assert counts[0] == 0
    standard_error = math.sqrt(num_draws * (1 / 3) * (2 / 3))
    assert (np.abs(counts[1:] - num_draws / 3) < 4 * standard_error).all()


def test_permutation_pairs_one_row_with_itself_on_average() -> None:
    rng, num_draws, rows = np.random.default_rng(0), 3000, np.arange(10)
    fixed_points = [int((RandomPermutation()(rng, 10) == rows).sum()) for _ in range(num_draws)]
    assert abs(np.mean(fixed_points) - 1) < 4 / math.sqrt(num_draws)  # their variance is 1 too


@pytest.mark.parametrize("pairing", [RandomPermutation(), Roll()], ids=["permutation", "roll"])
def test_partners_come_from_the_given_generator_alone(pairing: RandomPermutation | Roll) -> None:
    drawn = [pairing(np.random.default_rng(seed), 100).tolist() for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("pairing", ["roll", 3, Roll], ids=["name", "number", "class"])
def test_what_cannot_draw_is_refused(pairing: object) -> None:
    with pytest.raises(TypeError) as refusal:
        check_pairing(pairing)
    assert str(refusal.value) == (
        f"pairing must be a function of a numpy.random.Generator and the number of rows, got {pairing!r} of type "
        f"{type(pairing).__name__}. Give RandomPermutation() or Roll()."
    )


@pytest.mark.parametrize("pairing", [RandomPermutation(), Roll()], ids=["permutation", "roll"])
def test_repr_is_the_call_that_makes_it(pairing: RandomPermutation | Roll) -> None:
    assert eval(repr(pairing)) == pairing


CLASSES = torch.tensor([2, 0, 0, 1, 2, 0, 3, 2])  # class 1 and class 3 have one row each
SEEING = [
    pytest.param(SameClass(), {"targets": CLASSES}, id="same_class"),
    pytest.param(OtherClass(), {"targets": CLASSES}, id="other_class"),
    pytest.param(LabelDistance(0.5), {"targets": CLASSES}, id="label_distance"),
    pytest.param(NearestNeighbors(3), {"hidden": torch.arange(24.0).view(8, 3).sin()}, id="nearest"),
    pytest.param(MatchedGroups(3), {"hidden": torch.arange(24.0).view(8, 3).sin()}, id="matched"),
]


@pytest.mark.parametrize(("pairing", "seen"), SEEING)
def test_partners_that_depend_on_a_batch_come_from_it_and_the_given_generator_alone(
    pairing: Any, seen: dict[str, Tensor]
) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    drawn = [torch.as_tensor(pairing(np.random.default_rng(seed), 8, **seen)).tolist() for seed in (5, 5, 6, 7, 8, 9)]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn))) > 2
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.parametrize(("pairing", "seen"), SEEING)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_smallest_batches_have_partners(pairing: Any, seen: dict[str, Tensor], rows: int) -> None:
    partner = torch.as_tensor(pairing(np.random.default_rng(0), rows, **{k: v[:rows] for k, v in seen.items()}))
    assert partner.dtype == torch.int64
    assert partner.shape == (rows,)
    assert 0 <= int(partner.min()) <= int(partner.max()) < rows


def one_hot(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes).double() * 0.9 + 0.025


@pytest.mark.parametrize(
    "targets",
    [CLASSES, CLASSES[:, None], CLASSES.to(torch.uint8), one_hot(CLASSES)],
    ids=["indices", "column", "bytes", "smoothed"],
)
def test_same_class_permutes_the_rows_of_each_class(targets: Tensor) -> None:
    for seed in range(50):
        partner = SameClass()(np.random.default_rng(seed), 8, targets).tolist()
        assert sorted(partner) == list(range(8))
        assert [CLASSES[j] for j in partner] == CLASSES.tolist()


def test_same_class_draws_every_permutation_within_classes_equally_often() -> None:
    rng, num_draws, targets = np.random.default_rng(0), 6000, torch.tensor([1, 0, 1, 0, 1])
    counts = Counter(tuple(SameClass()(rng, 5, targets).tolist()) for _ in range(num_draws))
    assert len(counts) == 12  # 3! * 2!
    expected = num_draws / 12
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 11 + 4 * math.sqrt(2 * 11)


def test_classes_may_be_booleans() -> None:
    targets = torch.tensor([True, False, True, False])
    same = SameClass()(np.random.default_rng(0), 4, targets)
    other = OtherClass()(np.random.default_rng(0), 4, targets)
    assert torch.equal(targets[same], targets)
    assert torch.equal(targets[other], ~targets)


def test_other_class_draws_every_row_of_other_classes_equally_often() -> None:
    rng, num_draws = np.random.default_rng(0), 4000
    drawn = torch.stack([OtherClass()(rng, 8, CLASSES) for _ in range(num_draws)])
    for i in range(8):
        others = [j for j in range(8) if CLASSES[j] != CLASSES[i]]
        counts = torch.bincount(drawn[:, i], minlength=8)
        assert int(counts[others].sum()) == num_draws
        expected = num_draws / len(others)
        chi_square = float(((counts[others] - expected) ** 2 / expected).sum())
        freedom = len(others) - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


class Lowest:
    """Draws the smallest number that there is."""

    def random(self, size: Any) -> np.ndarray:
        return np.zeros(size)


def test_the_smallest_number_draws_no_row_of_the_own_class() -> None:
    rng: Any = Lowest()
    assert OtherClass()(rng, 4, torch.tensor([0, 0, 1, 2])).tolist() == [2, 2, 0, 0]


def test_rows_without_another_class_are_their_own_partners() -> None:
    assert OtherClass()(np.random.default_rng(0), 4, torch.ones(4, dtype=torch.int64)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("targets", "described"),
    [
        (torch.zeros(8), "torch.float32 of shape (8,)"),
        (torch.zeros(8, 1), "torch.float32 of shape (8, 1)"),
        (torch.zeros(8, 4, 4, dtype=torch.int64), "torch.int64 of shape (8, 4, 4)"),
    ],
    ids=["numbers", "column_of_numbers", "maps"],
)
@pytest.mark.parametrize("pairing", [SameClass(), OtherClass()], ids=["same", "other"])
def test_what_are_no_classes_is_refused(pairing: Any, targets: Tensor, described: str) -> None:
    message = (
        f"{pairing!r} needs classes as targets, (N,) integers or (N, K), got {described}. For numbers use "
        "LabelDistance(bandwidth)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pairing(np.random.default_rng(0), 8, targets)


@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
@pytest.mark.parametrize("columns", [1, 3], ids=["scalar", "vector"])
def test_label_distance_draws_by_the_papers_density(bandwidth: float, columns: int) -> None:
    targets = np.random.default_rng(1).normal(size=(6, columns))
    rng, num_draws = np.random.default_rng(0), 4000
    given = torch.from_numpy(targets[:, 0] if columns == 1 else targets)
    drawn = np.stack([LabelDistance(bandwidth)(rng, 6, given).numpy() for _ in range(num_draws)])
    for i in range(6):
        density = []
        for j in range(6):
            squared = sum((targets[i, c] - targets[j, c]) ** 2 for c in range(columns))
            density.append(math.exp(-squared / (2 * bandwidth**2)))
        expected = num_draws * np.array(density) / sum(density)
        counts = np.bincount(drawn[:, i], minlength=6)
        often = expected > 5
        chi_square = float(((counts - expected)[often] ** 2 / expected[often]).sum())
        assert chi_square < often.sum() + 4 * math.sqrt(2 * often.sum())
        assert counts[~often].sum() <= 4 * expected[~often].sum() + 8


def test_label_distance_of_far_labels_is_the_row_itself() -> None:
    targets = torch.tensor([0.0, 1e3, -1e3, 1e6])
    assert LabelDistance(0.1)(np.random.default_rng(0), 4, targets).tolist() == [0, 1, 2, 3]


def hidden_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _reference_distances(hidden: Tensor) -> list[list[float]]:
    """Squared Euclidean distances between all rows."""
    rows = [row.flatten().tolist() for row in hidden]
    return [[sum((a - b) ** 2 for a, b in zip(own, other, strict=True)) for other in rows] for own in rows]


@pytest.mark.parametrize("shape", [(9,), (9, 4), (9, 2, 3), (40, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_partners_are_among_the_nearest_others(shape: tuple[int, ...], count: int) -> None:
    hidden = hidden_states(*shape)
    distances = _reference_distances(hidden)
    rng, seen = np.random.default_rng(0), [set[int]() for _ in hidden]
    for _ in range(1 if count == 1 else 200):
        for i, j in enumerate(NearestNeighbors(count)(rng, len(hidden), hidden).tolist()):
            seen[i].add(j)
    for i, row in enumerate(distances):
        others = sorted((j for j in range(len(hidden)) if j != i), key=row.__getitem__)
        assert seen[i] <= set(others[:count])
        assert len(seen[i]) >= min(count, 5)


def test_a_row_is_never_its_own_nearest() -> None:
    partner = NearestNeighbors()(np.random.default_rng(0), 4, torch.ones(4, 3))
    assert all(i != j for i, j in enumerate(partner.tolist()))


def test_nearest_rows_of_complex_states_are_told_by_both_parts() -> None:
    hidden = torch.complex(torch.tensor([0.0, 0.1, 0.2, 0.3]), torch.tensor([0.0, 9.0, 0.0, 9.0]))[:, None]
    assert NearestNeighbors()(np.random.default_rng(0), 4, hidden).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(12,), (12, 3), (13, 2, 2)], ids=str)
def test_groups_are_matched_as_well_as_the_best_of_all_assignments(size: int, shape: tuple[int, ...]) -> None:
    hidden = hidden_states(*shape)
    rows, distances = len(hidden), _reference_distances(hidden)
    for seed in range(5):
        partner = MatchedGroups(size)(np.random.default_rng(seed), rows, hidden).tolist()
        assert sorted(partner) == list(range(rows))
        assert all(row != other for row, other in enumerate(partner))
        k = min(size, rows // 2)
        own = np.random.default_rng(seed).permutation(rows).tolist()
        for begin in range(0, rows, k):
            group = own[begin : begin + k]
            others = [own[(begin + k + place) % rows] for place in range(len(group))]
            assert {partner[i] for i in group} == set(others)
            cost = sum(distances[i][partner[i]] for i in group)
            costs = (
                sum(distances[i][j] for i, j in zip(group, order, strict=True))
                for order in itertools.permutations(others)
            )
            assert cost == pytest.approx(min(costs), abs=1e-9)


def test_matching_without_scipy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError) as refusal:
        MatchedGroups()
    assert str(refusal.value) == (
        "MatchedGroups assigns rows with scipy, which is not installed. Install it, or use NearestNeighbors()."
    )


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_the_surest_row_is_paired_with_the_least_sure(rows: int) -> None:
    logits = hidden_states(rows, 3)
    surety = [max(math.exp(x) for x in row) / sum(math.exp(x) for x in row) for row in logits.tolist()]
    order = sorted(range(rows), key=surety.__getitem__)
    expected = [order[rows - 1 - order.index(i)] for i in range(rows)]
    assert ConfidentWithUnconfident()(np.random.default_rng(0), rows, logits).tolist() == expected


Named = namedtuple("Named", ["x", "partner"])
PARTNER = torch.tensor([1, 2, 0])


@pytest.mark.parametrize(
    ("field", "batch"),
    [
        ("partner", {"x": torch.zeros(3), "partner": PARTNER}),
        ("2", (torch.zeros(3), torch.zeros(3), PARTNER)),
        (2, (torch.zeros(3), torch.zeros(3), PARTNER)),
        ("meta.partner", {"meta": {"partner": PARTNER}}),
        ("meta.1", {"meta": [torch.zeros(3), PARTNER]}),
        ("partner", Named(torch.zeros(3), PARTNER)),
        ("partner", SimpleNamespace(partner=PARTNER)),
        ("partner", {"x": torch.zeros(3), "partner": PARTNER.numpy()}),
        ("partner", {"x": torch.zeros(3), "partner": [1, 2, 0]}),
        ("partner", {"x": torch.zeros(3), "partner": PARTNER.to(torch.int32)}),
    ],
    ids=["key", "position", "number", "nested", "list", "named_tuple", "attribute", "array", "numbers", "int32"],
)
def test_partners_are_taken_from_a_field_of_the_batch(field: str | int, batch: Any) -> None:
    plan = PlanSource(["input"], FixedRatio(0.25), FromBatch(field)).draw(3, batch=batch)
    assert plan.partner.dtype == torch.int64
    assert plan.partner.tolist() == [1, 2, 0]
    assert plan.inverse is not None
    assert plan.inverse.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "partner",
    [torch.tensor([1, 2, 3]), torch.tensor([-1, 0, 1]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])],
    ids=["too_large", "negative", "too_few", "floats"],
)
def test_fields_that_hold_no_partners_are_refused(partner: Tensor) -> None:
    message = "FromBatch(field='partner') must draw one row in 0 ... 2 for each of the rows."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PlanSource(["input"], pairing=FromBatch()).draw(3, batch={"partner": partner})


def test_a_missing_field_is_refused() -> None:
    message = "field must name a part of the batch, got 'pair'. It has 'x', 'meta.partner'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FromBatch("pair")(np.random.default_rng(0), 3, {"x": torch.zeros(3), "meta": {"partner": PARTNER}})


def test_what_a_pairing_asks_to_see_must_be_given() -> None:
    plan = PlanSource(["input"], pairing=SameClass()).draw(8)
    assert plan.asks_for == {"targets"}
    settled = plan.settled(targets=CLASSES, batch=None)
    assert settled.asks_for == frozenset()
    again = PlanSource(["input"], pairing=SameClass()).draw(8, targets=CLASSES)
    assert again.partner.tolist() == settled.partner.tolist() != list(range(8))
    assert again.shared_lam == settled.shared_lam


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LabelDistance(0.0),
            ValueError,
            "bandwidth must be a finite number > 0, got 0.0. It is a distance of targets.",
        ),
        (lambda: NearestNeighbors(0), ValueError, "count must be an integer >= 1, got 0. 1 is the nearest alone."),
        (
            lambda: NearestNeighbors(1.5),  # type: ignore[arg-type]
            TypeError,
            "count must be an integer >= 1, got 1.5 of type float. 1 is the nearest alone.",
        ),
        (lambda: MatchedGroups(-1), ValueError, "size must be an integer >= 1, got -1. 1 pairs at random."),
        (
            lambda: FromBatch(2.5),  # type: ignore[arg-type]
            TypeError,
            "field must be the name of a part of the batch, got 2.5 of type float. Give 'partner', say.",
        ),
    ],
    ids=["bandwidth", "count", "count_type", "size", "field"],
)
def test_settings_out_of_range_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        make()
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "pairing",
    [
        SameClass(),
        OtherClass(),
        LabelDistance(0.5),
        NearestNeighbors(3),
        MatchedGroups(4),
        ConfidentWithUnconfident(),
        FromBatch("a.b"),
    ],
    ids=lambda pairing: type(pairing).__name__,
)
def test_repr_of_what_sees_a_batch_is_the_call_that_makes_it(pairing: Any) -> None:
    assert eval(repr(pairing)) == pickle.loads(pickle.dumps(pairing)) == pairing
