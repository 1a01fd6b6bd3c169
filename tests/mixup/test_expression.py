from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan, TargetPair
from mm_lightning.mixup.expression import (
    Expression,
    is_by_row,
    is_in_place,
    is_independent,
    is_network,
    is_random,
    keeps_rows,
)

N = 4
PARTNER = torch.tensor([2, 0, 3, 1])
VALUES = torch.tensor([3.0, 1.0, 4.0, 1.5])


def start() -> tuple[MixPlan, Mixer]:
    plan = MixPlan(INPUT, PARTNER, torch.tensor([0.3125]).expand(N))
    mixer = Mixer([Layer(INPUT)])
    mixer.start(plan)
    mixer.record_input()
    return plan, mixer


def pair_up(values: Tensor = VALUES) -> TargetPair:
    plan, mixer = start()
    return TargetPair.wrap(values.clone(), plan, mixer)


def own(tensor: Tensor) -> Tensor:
    return tensor.own if isinstance(tensor, TargetPair) else tensor


def partner(tensor: Tensor) -> Tensor:
    return tensor.partner if isinstance(tensor, TargetPair) else tensor


@pytest.mark.parametrize(("side", "half"), [(own, VALUES), (partner, VALUES[PARTNER])], ids=["own", "partner"])
def test_call_is_made_again_with_one_half_of_its_pairs(side: Callable[[TargetPair], Tensor], half: Tensor) -> None:
    pair, plain = pair_up(), torch.arange(4.0)
    expression = Expression(torch.add, (pair, plain), {"alpha": 2}, [pair, plain])
    (value,) = expression.evaluate(side)
    assert type(value) is Tensor
    assert torch.equal(value, half + 2 * plain)


def test_pairs_in_lists_and_keywords_are_found() -> None:
    pair = pair_up()
    (value,) = Expression(torch.cat, ([pair, torch.zeros(1), pair],), {}, [pair]).evaluate(partner)
    assert value.tolist() == [4, 3, 1.5, 1, 0, 4, 3, 1.5, 1]
    (value,) = Expression(torch.sub, (), {"input": torch.zeros(4), "other": pair}, [pair]).evaluate(partner)
    assert value.tolist() == [-4, -3, -1.5, -1]


def test_every_tensor_of_the_result_is_returned() -> None:
    pair = pair_up()
    values, indices = Expression(torch.sort, (pair,), {"descending": True}, [pair]).evaluate(partner)
    assert values.tolist() == [4, 3, 1.5, 1]
    assert indices.tolist() == [0, 1, 2, 3]
    assert len(Expression(torch.chunk, (pair, 2), {}, [pair]).evaluate(own)) == 2


@pytest.mark.parametrize("wants_grad", [True, False], ids=["with_grad", "without_grad"])
def test_gradient_is_recorded_as_it_was_when_the_call_was_made(wants_grad: bool) -> None:
    pair, weight = pair_up(), torch.ones(4, requires_grad=True)
    with torch.set_grad_enabled(wants_grad):
        expression = Expression(torch.mul, (pair, weight), {}, [pair, weight])
    with torch.set_grad_enabled(not wants_grad):
        (value,) = expression.evaluate(partner)
        assert torch.is_grad_enabled() is not wants_grad
    assert value.requires_grad is wants_grad


def change_pair(pair: Tensor, plain: Tensor) -> None:
    pair.add_(1)


def change_plain(pair: Tensor, plain: Tensor) -> None:
    plain.zero_()


def change_a_view(pair: Tensor, plain: Tensor) -> None:
    plain[:2] = 7


@pytest.mark.parametrize("change", [change_pair, change_plain, change_a_view])
def test_operand_that_was_changed_in_place_meanwhile_is_refused(change: Callable[[Tensor, Tensor], None]) -> None:
    pair, plain = pair_up(), torch.ones(4)
    expression = Expression(torch.mul, (pair, plain), {}, [pair, plain])
    change(pair, plain)
    with pytest.raises(
        RuntimeError, match=r"An operand of 'mul', .* was changed in place before the loss was computed"
    ):
        expression.evaluate(partner)


def test_change_in_place_of_another_tensor_is_allowed() -> None:
    pair, plain, other = pair_up(), torch.ones(4), torch.ones(4)
    expression = Expression(torch.mul, (pair, plain), {}, [pair, plain])
    other.zero_()
    assert expression.evaluate(partner)[0].tolist() == [4, 3, 1.5, 1]


def test_view_sees_a_change_in_place_of_what_it_views() -> None:
    pair = pair_up(VALUES.view(2, 2).repeat(2, 1))
    view = pair.view(-1)
    pair.mul_(2)
    assert view.tolist() == (2 * VALUES).repeat(2).tolist()
    assert view.partner.tolist() == pair.partner.reshape(-1).tolist()


def mask_of(targets: Tensor) -> Tensor:
    return targets > 2


def test_targets_changed_between_use_and_loss_are_those_of_the_use() -> None:
    pair, logits = pair_up(), torch.ones(4, requires_grad=True)
    mask = mask_of(pair)
    pair.clamp_(max=2)
    loss = logits * mask
    expected = 0.3125 * (VALUES > 2) + (1 - 0.3125) * (VALUES[PARTNER] > 2)
    assert_close(loss.value.detach(), expected, rtol=1e-6, atol=0)


def test_targets_changed_after_the_loss_do_no_harm() -> None:
    pair, logits = pair_up(), torch.ones(4, requires_grad=True)
    loss = (logits * mask_of(pair)).sum()
    pair.clamp_(max=2)
    lam = 0.3125
    assert_close(loss.value, lam * (VALUES > 2).sum() + (1 - lam) * (VALUES[PARTNER] > 2).sum(), rtol=1e-6, atol=0)
    root = loss.sqrt()
    assert_close(root.value, torch.tensor(2.0).sqrt(), rtol=1e-6, atol=0)


def test_buffer_changed_between_use_and_loss_is_refused() -> None:
    pair, buffer, logits = pair_up(), torch.ones(4), torch.ones(4, requires_grad=True)
    scaled = pair * buffer
    buffer.mul_(0.9)
    with pytest.raises(RuntimeError, match=r"An operand of '(__mul__|mul)', .* Change a copy instead"):
        logits * scaled


def test_tensor_of_inference_mode_has_no_version_to_watch() -> None:
    with torch.inference_mode():
        plain = torch.ones(4)
    pair = pair_up()
    assert Expression(torch.mul, (pair, plain), {}, [pair, plain]).evaluate(own)[0].tolist() == VALUES.tolist()


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("add_", {}, True),
        ("masked_fill_", {}, True),
        ("__setitem__", {}, True),
        ("__iadd__", {}, True),
        ("mul", {"out": torch.zeros(1)}, True),
        ("mul", {"out": None}, False),
        ("add", {}, False),
        ("__add__", {}, False),
        ("__invert__", {}, False),
        ("__getitem__", {}, False),
    ],
)
def test_function_in_place_is_known_by_its_name(name: str, kwargs: dict[str, Any], expected: bool) -> None:
    assert is_in_place(name, kwargs) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zeros_like", True),
        ("rand_like", True),
        ("new_full", True),
        ("one_hot", False),
        ("like", False),
        ("add", False),
    ],
)
def test_function_of_the_shape_alone_is_known_by_its_name(name: str, expected: bool) -> None:
    assert is_independent(name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dropout", True), ("bernoulli", True), ("multinomial", True), ("normal", True), ("norm", False), ("sort", False)],
)
def test_random_function_is_known_by_its_name(name: str, expected: bool) -> None:
    assert is_random(name) is expected


def test_trained_layer_of_a_network_is_known_by_its_name_and_its_weights() -> None:
    rows, weight = torch.ones(2, 3), nn.Parameter(torch.ones(3, 3))
    assert is_network("linear", [weight])
    assert is_network("matmul", [weight])
    assert not is_network("linear", [weight.detach()])  # frozen
    assert not is_network("matmul", [weight * 1])  # what the network made of the batch, say
    assert not is_network("matmul", [rows])
    assert not is_network("mul", [weight])


def test_frozen_layers_and_noise_work_row_by_row() -> None:
    assert [name for name in ("linear", "conv2d", "dropout", "matmul", "sum") if is_by_row(name)] == [
        "linear",
        "conv2d",
        "dropout",
    ]


def halves_and_mixed(factor: float = 1.0) -> tuple[Tensor, Tensor, TargetPair]:
    """The losses of the own targets, of the partners', and their interpolation as it stands in a step."""
    plan, mixer = start()
    logits = (factor * VALUES.double()).requires_grad_()
    targets = TargetPair.wrap(VALUES.double().flip(0), plan, mixer)
    own, partner = ((logits - y).abs() for y in (targets.own, targets.partner))
    return own.detach(), partner.detach(), (logits - targets).abs()


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x * 3, id="mul"),
        pytest.param(lambda x: 3 / (x + 1), id="div_of_a_number"),
        pytest.param(lambda x: torch.div(x, 0.7, rounding_mode="floor"), id="div_with_rounding"),
        pytest.param(lambda x: x // 0.7, id="floor_divide"),
        pytest.param(lambda x: x % 0.7, id="remainder"),
        pytest.param(lambda x: x.sum(), id="sum"),
        pytest.param(lambda x: torch.stack([x, 2 * x]).mean(0), id="stack"),
        pytest.param(lambda x: torch.cat([x, x * x]), id="cat"),
        pytest.param(lambda x: x[1:3], id="slice"),
        pytest.param(lambda x: x[torch.tensor([2, 0])], id="index"),
        pytest.param(lambda x: x.sqrt(), id="sqrt"),
        pytest.param(lambda x: x.abs() - x, id="abs"),
        pytest.param(lambda x: x.clamp(0.5, 2.0), id="clamp"),
        pytest.param(lambda x: x.amax(), id="amax"),
        pytest.param(lambda x: x.sort().values, id="sort"),
        pytest.param(lambda x: x.std(), id="std"),
        pytest.param(lambda x: x.softmax(0), id="softmax"),
        pytest.param(lambda x: x.to(torch.int64).double(), id="to_integers"),
        pytest.param(lambda x: x.round(), id="round"),
        pytest.param(lambda x: torch.where(x > 1, x, 0.0), id="where"),
        pytest.param(lambda x: x * x, id="product_with_itself"),
        pytest.param(lambda x: x / x.sum(), id="share"),
        pytest.param(lambda x: torch.maximum(x, x.mean()), id="maximum"),
        pytest.param(lambda x: x.detach().exp(), id="detach"),
        pytest.param(lambda x: x.float().double().square(), id="float"),
        pytest.param(lambda x: torch.linalg.vector_norm(x), id="norm"),
    ],
)
def test_function_of_mixed_losses_is_the_interpolation_of_its_halves(function: Callable[[Tensor], Tensor]) -> None:
    own, partner, mixed = halves_and_mixed()
    result = function(mixed)
    expected = 0.3125 * function(own) + (1 - 0.3125) * function(partner)
    assert_close(result.own.detach(), function(own), rtol=1e-12, atol=0)
    assert_close(result.partner.detach(), function(partner), rtol=1e-12, atol=0)
    assert_close(result.value.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, F.mse_loss, torch.dot])
def test_function_of_two_mixed_losses_is_the_interpolation_of_its_halves(function: Callable[..., Tensor]) -> None:
    (own, partner, mixed), (other_own, other_partner, other_mixed) = halves_and_mixed(), halves_and_mixed(2.0)
    result = function(mixed, other_mixed)
    expected = 0.3125 * function(own, other_own) + (1 - 0.3125) * function(partner, other_partner)
    assert_close(result.value.detach(), expected, rtol=1e-12, atol=0)


COLUMN = (torch.arange(N), torch.arange(N))


@pytest.mark.parametrize(
    ("name", "args", "shape", "expected"),
    [
        pytest.param("add", (), (N, 3), True, id="add"),
        pytest.param("cross_entropy", (), (N,), True, id="cross_entropy"),
        pytest.param("mse_loss", (), (N, 3), True, id="mse_loss"),
        pytest.param("sum", (None,), (), False, id="scalar"),
        pytest.param("sum", (None, 1), (N,), True, id="sum_of_columns"),
        pytest.param("sum", (None, 0), (N,), False, id="sum_of_rows"),
        pytest.param("mean", (None, -2), (N,), False, id="mean_of_rows_from_behind"),
        pytest.param("flatten", (), (3 * N,), False, id="flat"),
        pytest.param("flip", (None, 0), (N, 3), False, id="flip"),
        pytest.param("cat", (), (N, 3), False, id="cat"),
        pytest.param("t", (), (N, N), False, id="t"),
        pytest.param("swapaxes", (None, 0, 1), (N, N), False, id="swapaxes"),
        pytest.param("matmul", (), (N, N), False, id="matmul"),
        pytest.param("__getitem__", (None, slice(None)), (N, 3), True, id="all_rows"),
        pytest.param("__getitem__", (None, (slice(None), 0)), (N,), True, id="column"),
        pytest.param("__getitem__", (None, (Ellipsis, 0)), (N,), True, id="ellipsis"),
        pytest.param("__getitem__", (None, COLUMN), (N,), True, id="own_element_of_each_row"),
        pytest.param("__getitem__", (None, (range(N), COLUMN[0])), (N,), True, id="range"),
        pytest.param("__getitem__", (None, torch.tensor([3, 2, 1, 0])), (N, 3), False, id="rows_in_another_order"),
        pytest.param("__getitem__", (None, slice(None, None, 2)), (N, 3), False, id="every_second_row"),
        pytest.param("gather", (None, 1), (N, 1), True, id="gather_of_columns"),
        pytest.param("gather", (None, 0), (N, 1), False, id="gather_of_rows"),
        pytest.param("gather", (None, -2), (N, 1), False, id="gather_of_rows_from_behind"),
    ],
)
def test_function_that_keeps_rows_in_place(
    name: str, args: tuple[Any, ...], shape: tuple[int, ...], expected: bool
) -> None:
    assert keeps_rows(name, args, {}, torch.zeros(shape), N) is expected


def test_dimension_given_by_its_name_is_found() -> None:
    assert keeps_rows("sum", (None,), {"dim": 1}, torch.zeros(N), N)
    assert not keeps_rows("sum", (None,), {"dim": 0}, torch.zeros(N), N)
    assert not keeps_rows("sum", (None,), {"dim": (0, 2)}, torch.zeros(N), N)
