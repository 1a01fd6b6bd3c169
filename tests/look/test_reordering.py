"""Where the rows of the batch are: found by reordering it. And how far apart equal losses may be."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning import ManifoldMixupCallback
from mm_lightning.look.reordering import RowSamples, mover, order_of, tolerance_of

N = 6


@pytest.mark.parametrize("rows", [2, 3, 6, 17, 64])
def test_order_is_one_cycle_through_all_rows(rows: int) -> None:
    order, row, seen = order_of(rows).tolist(), 0, []
    for _ in range(rows):
        seen.append(row)
        row = order[row]
    assert row == 0
    assert sorted(seen) == list(range(rows))


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def dims(plain: Tensor, reordered: Tensor, sizes: Any = (N,)) -> tuple[int | None, ...]:
    return RowSamples([plain], sizes, is_reordered=False).dims(RowSamples([reordered], sizes, is_reordered=True))


def moved(tensor: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, order_of(N))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        pytest.param((N,), 0, id="no_features"),
        pytest.param((N, 4), 0, id="batch_first"),
        pytest.param((5, N, 4), 1, id="time_first"),
        pytest.param((N, N), 1, id="as_many_features"),
        pytest.param((N, N, 3), 1, id="as_many_steps_before_it"),
        pytest.param((N, N, 3), 0, id="as_many_steps_after_it"),
        pytest.param((N, 3, 40, 40), 0, id="more_features_than_are_compared"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_rows_are_where_the_order_changed(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    tensor = numbers(*shape, dtype=dtype)
    assert dims(tensor, moved(tensor, dim)) == (dim,)


def test_what_stayed_or_changed_otherwise_has_no_rows() -> None:
    tensor = numbers(N, 4)
    assert dims(tensor, tensor) == (None,)
    assert dims(tensor, tensor.flip(0)) == (None,)
    assert dims(tensor, moved(tensor, 0) + 1e-3) == (None,)


def test_integers_and_tensors_without_such_a_length_have_no_rows() -> None:
    assert dims(torch.arange(N), moved(torch.arange(N), 0)) == (None,)
    assert dims(numbers(5, 4), numbers(5, 4)) == (None,)
    assert dims(numbers(N, 0), numbers(N, 0)) == (0,)  # there is nothing that could be wrong


def test_a_dimension_in_which_all_is_alike_is_not_taken_for_the_rows() -> None:
    tensor = numbers(N).expand(N, N).clone()  # rows in dimension 1, each the same at all steps
    assert dims(tensor, moved(tensor, 1)) == (1,)


def test_what_is_no_number_is_equal_to_itself() -> None:
    tensor = numbers(N, 2)
    tensor[1, 0], tensor[2, 1] = float("nan"), float("inf")
    assert dims(tensor, moved(tensor, 0)) == (0,)


def test_each_tensor_has_its_own() -> None:
    first, second = numbers(N, 2), numbers(3, N)
    plain = RowSamples([first, second], {N}, is_reordered=False)
    other = RowSamples([moved(first, 0), moved(second, 1)], {N}, is_reordered=True)
    assert plain.dims(other) == (0, 1)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ([torch.float64], 1e-9),
        ([torch.float32, torch.float64], 1e-4),
        ([torch.complex64], 1e-4),
        ([torch.float32, torch.bfloat16], 2e-2),
        ([torch.half], 2e-2),
    ],
    ids=str,
)
def test_tolerance_is_of_the_least_precise_type(dtypes: list[torch.dtype], tolerance: float) -> None:
    assert tolerance_of(*dtypes) == tolerance


class WeighsByPlace(pl.LightningModule):
    """A row counts by its place in the batch: a little, so that the loss of the rows in another order is another."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        self.by = by

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weights = 1 + self.by * torch.linspace(-1, 1, len(x), dtype=x.dtype)
        return (weights * F.cross_entropy(3 * self.net(x), y, reduction="none")).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("dtype", "by", "is_seen"),
    [(torch.float32, 5e-3, True), (torch.float32, 1e-6, False), (torch.float64, 1e-6, True)],
    ids=["float32_seen", "float32_rounding", "float64_seen"],
)
def test_a_loss_that_differs_by_more_than_rounding_is_refused(
    make_trainer: Callable[..., pl.Trainer], dtype: torch.dtype, by: float, is_seen: bool
) -> None:
    torch.manual_seed(0)
    module, batch = WeighsByPlace(by).to(dtype), (numbers(N, 3, dtype=dtype), torch.arange(N) % 2)

    class Batches(list[Any]):
        pass

    trainer = make_trainer(ManifoldMixupCallback(layers="net.0"))
    if is_seen:
        with pytest.raises(RuntimeError, match=r"in another order, the loss is"):
            trainer.fit(module, Batches([batch]))
    else:
        trainer.fit(module, Batches([batch]))
        assert trainer.global_step == 1


def test_noise_moves_with_the_rows_it_is_for() -> None:
    order = order_of(N)
    move = mover(order)
    batch_first, time_first, alone = numbers(N, 4), numbers(5, N, 2), numbers(5, 4)
    assert torch.equal(move(batch_first), batch_first[order])
    assert torch.equal(move(time_first), time_first[:, order])
    assert torch.equal(move(alone), alone)
    several = numbers(2 * N, 3)  # two for each row, one after the other
    assert torch.equal(move(several), torch.cat([several[2 * row : 2 * row + 2] for row in order.tolist()]))
    assert move(torch.tensor(1.0)) == 1
