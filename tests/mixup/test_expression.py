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
    is_linear,
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


@pytest.mark.parametrize(
    ("function", "is_affine"),
    [
        pytest.param(torch.add, True, id="add"),
        pytest.param(torch.sub, True, id="sub"),
        pytest.param(torch.mul, False, id="mul_of_two_pairs"),
        pytest.param(torch.div, False, id="div_of_two_pairs"),
        pytest.param(torch.maximum, False, id="maximum"),
        pytest.param(F.mse_loss, False, id="mse_loss"),
    ],
)
def test_affine_function_of_two_pairs(function: Callable[..., Tensor], is_affine: bool) -> None:
    a, b = (pair_up(values) for values in (VALUES, VALUES.exp()))
    assert is_linear(function.__name__, [a, b], (a, b)) is is_affine
    assert _is_affine(lambda x, y: function(x, y)) is is_affine


@pytest.mark.parametrize(
    ("function", "is_affine"),
    [
        pytest.param(lambda x: ("mul", (x, 3.0)), True, id="mul_by_a_number"),
        pytest.param(lambda x: ("mul", (3.0, x)), True, id="mul_of_a_number"),
        pytest.param(lambda x: ("div", (x, 3.0)), True, id="div_by_a_number"),
        pytest.param(lambda x: ("div", (torch.ones(4), x)), False, id="div_of_a_tensor"),
        pytest.param(lambda x: ("sum", (x,)), True, id="sum"),
        pytest.param(lambda x: ("mean", (x,)), True, id="mean"),
        pytest.param(lambda x: ("stack", ([x, x],)), True, id="stack"),
        pytest.param(lambda x: ("sqrt", (x,)), False, id="sqrt"),
        pytest.param(lambda x: ("exp", (x,)), False, id="exp"),
        pytest.param(lambda x: ("abs", (x,)), False, id="abs"),
        pytest.param(lambda x: ("clamp", (x, 0.0, 2.0)), False, id="clamp"),
        pytest.param(lambda x: ("amax", (x,)), False, id="amax"),
        pytest.param(lambda x: ("square", (x,)), False, id="square"),
        pytest.param(lambda x: ("nan_to_num", (x,)), False, id="nan_to_num"),
    ],
)
def test_affine_function_of_one_pair(
    function: Callable[[Tensor], tuple[str, tuple[Any, ...]]], is_affine: bool
) -> None:
    pair = pair_up()
    name, args = function(pair)
    assert is_linear(name, [pair], args) is is_affine


def test_rounding_division_is_not_affine() -> None:
    plan, mixer = start()
    logits = VALUES.double().requires_grad_()
    loss = (logits - TargetPair.wrap(VALUES.double(), plan, mixer)).abs()
    rounded = torch.div(loss, 0.7, rounding_mode="floor")
    halves = [(VALUES.double() - VALUES.double()[rows]).abs().div(0.7).floor() for rows in (torch.arange(N), PARTNER)]
    assert_close(rounded.value.detach(), 0.3125 * halves[0] + (1 - 0.3125) * halves[1], rtol=1e-12, atol=0)


def _is_affine(function: Callable[[Tensor, Tensor], Tensor]) -> bool:
    a, b, c, d = (VALUES * factor for factor in (1.0, -2.0, 0.5, 3.0))
    return torch.allclose(function((a + b) / 2, (c + d) / 2), (function(a, c) + function(b, d)) / 2)


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
