import math

import numpy as np
import pytest

from mm_lightning.mixup import RandomPermutation, Roll
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
