import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

from mm_lightning.data import TensorBatches

NUM_ROWS = 10
ROWS = torch.arange(NUM_ROWS)
SQUARES = ROWS.double().square().unsqueeze(1)


def make_sampler(
    num_rows: int = NUM_ROWS, shuffle: bool = True, seed: int = 0, num_replicas: int = 1, rank: int = 0
) -> DistributedSampler[Tensor]:
    return DistributedSampler(ROWS[:num_rows], num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]


def orders(loader: TensorBatches) -> list[list[int]]:
    return [rows.tolist() for rows, *_ in loader]


def test_batches_are_the_rows_in_the_samplers_order() -> None:
    sampler = make_sampler()
    expected = list(sampler)
    batches = list(TensorBatches([ROWS, SQUARES], batch_size=4, sampler=sampler))
    assert [rows.tolist() for rows, _ in batches] == [expected[:4], expected[4:8], expected[8:]]
    for rows, squares in batches:
        assert_close(squares, rows.double().square().unsqueeze(1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        pytest.param(4, False, [4, 4, 2], id="short last batch"),
        pytest.param(4, True, [4, 4], id="short last batch dropped"),
        pytest.param(5, True, [5, 5], id="full last batch kept"),
        pytest.param(1, False, [1] * 10, id="single rows"),
        pytest.param(11, False, [10], id="larger than the data"),
        pytest.param(11, True, [], id="larger than the data, dropped"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batch_sizes_and_len(batch_size: int, drop_last: bool, sizes: list[int], shuffle: bool) -> None:
    loader = TensorBatches([ROWS], batch_size, make_sampler(shuffle=shuffle), drop_last)
    assert [len(rows) for (rows,) in loader] == sizes
    assert len(loader) == len(sizes)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        loader = TensorBatches([ROWS], 4, make_sampler(seed=seed))
        loader.sampler.set_epoch(epoch)
        return orders(loader)

    assert order(seed=3, epoch=2) == order(seed=3, epoch=2)
    assert order(seed=3, epoch=2) != order(seed=3, epoch=1)
    assert order(seed=3, epoch=2) != order(seed=7, epoch=2)


def test_sequential_order_yields_views_and_shuffled_order_copies() -> None:
    def shares_memory(loader: TensorBatches) -> list[bool]:
        return [squares.untyped_storage().data_ptr() == SQUARES.untyped_storage().data_ptr() for _, squares in loader]

    assert shares_memory(TensorBatches([ROWS, SQUARES], 4, make_sampler(shuffle=False))) == [True] * 3
    assert shares_memory(TensorBatches([ROWS, SQUARES], 4, make_sampler(shuffle=True))) == [False] * 3
    # in order, but not from row 0 on in steps of one
    second_rank = make_sampler(shuffle=False, num_replicas=2, rank=1)
    assert orders(TensorBatches([ROWS], 4, second_rank)) == [[1, 3, 5, 7], [9]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_iteration_from_batch_k_is_the_tail_of_the_whole_epoch(first: int, shuffle: bool) -> None:
    whole = orders(TensorBatches([ROWS], 4, make_sampler(shuffle=shuffle)))
    resumed = orders(TensorBatches([ROWS], 4, make_sampler(shuffle=shuffle), first_batch=lambda: first))
    assert resumed == whole[first:]


def test_epoch_and_first_batch_are_read_at_the_first_next() -> None:
    first = 0
    loader = TensorBatches([ROWS], 4, make_sampler(), first_batch=lambda: first)
    loader.sampler.set_epoch(5)
    expected = orders(loader)[1:]
    loader.sampler.set_epoch(0)
    batches = iter(loader)
    loader.sampler.set_epoch(5)
    first = 1
    assert [rows.tolist() for (rows,) in batches] == expected


def test_change_of_epoch_leaves_a_running_iteration_alone() -> None:
    loader = TensorBatches([ROWS], 4, make_sampler())
    expected = orders(loader)
    batches = iter(loader)
    seen = [next(batches)[0].tolist()]
    loader.sampler.set_epoch(1)
    seen += [rows.tolist() for (rows,) in batches]
    assert seen == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_partition_the_rows(shuffle: bool) -> None:
    loaders = [TensorBatches([ROWS], 2, make_sampler(shuffle=shuffle, num_replicas=2, rank=rank)) for rank in (0, 1)]
    per_rank = [[row for batch in orders(loader) for row in batch] for loader in loaders]
    assert [len(rows) for rows in per_rank] == [5, 5]
    assert sorted(per_rank[0] + per_rank[1]) == ROWS.tolist()
    assert [len(loader) for loader in loaders] == [3, 3]


def test_iteration_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first = orders(TensorBatches([ROWS], 4, make_sampler()))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert orders(TensorBatches([ROWS], 4, make_sampler())) == first
    torch.set_rng_state(before)


def test_state_is_the_loaders_shape() -> None:
    loader = TensorBatches([ROWS, SQUARES], 4, make_sampler())
    assert loader.state_dict() == {"num_samples": 10, "batch_size": 4, "num_batches": 3}
    loader.load_state_dict({"num_samples": 10, "batch_size": 4, "num_batches": 3})


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(TensorBatches([ROWS[:9]], 4, make_sampler(num_rows=9)), id="num_samples"),
        pytest.param(TensorBatches([ROWS], 5, make_sampler(), drop_last=True), id="batch_size"),
        pytest.param(TensorBatches([ROWS], 4, make_sampler(num_replicas=2)), id="num_batches"),
    ],
)
def test_state_of_a_loader_of_another_shape_is_refused(other: TensorBatches) -> None:
    loader = TensorBatches([ROWS], 4, make_sampler())
    with pytest.raises(ValueError, match="would repeat or skip samples") as refusal:
        loader.load_state_dict(other.state_dict())
    assert str(other.state_dict()) in str(refusal.value)
    assert str(loader.state_dict()) in str(refusal.value)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^tensors must hold at least one tensor, got none\."):
        TensorBatches([], 4, make_sampler())
    with pytest.raises(ValueError, match=r"^tensors must have equal lengths, got \[10, 9\]\."):
        TensorBatches([ROWS, SQUARES[:9]], 4, make_sampler())
    with pytest.raises(ValueError, match=r"^sampler must order as many rows as tensors have, got 9 and 10\."):
        TensorBatches([ROWS], 4, make_sampler(num_rows=9))
    with pytest.raises(ValueError, match=r"^batch_size must be an integer >= 1, got 0\. 1 yields single rows\.$"):
        TensorBatches([ROWS], 0, make_sampler())
    with pytest.raises(TypeError, match=r"^batch_size must be an integer >= 1, got '4' of type str\."):
        TensorBatches([ROWS], "4", make_sampler())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^drop_last must be True or False, got 'no' of type str\."):
        TensorBatches([ROWS], 4, make_sampler(), drop_last="no")  # type: ignore[arg-type]
