import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_lightning.mixup.trees import map_tensors, tensors_in

Point = namedtuple("Point", ["x", "label"])


@dataclasses.dataclass
class Output:
    hidden: Any = None
    rest: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenOutput:
    hidden: Any = None
    rest: Any = None


@dataclasses.dataclass
class CountedOutput(Output):
    """A dataclass with more than its fields, and one field that is not an argument."""

    total: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.built = getattr(self, "built", 0) + 1


A, B, C = (torch.tensor([float(i)]) for i in range(3))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        pytest.param(A, A + 10, id="tensor"),
        pytest.param([A, B], [A + 10, B + 10], id="list"),
        pytest.param((A, "name", 3, None), (A + 10, "name", 3, None), id="tuple_of_other_things"),
        pytest.param({"b": B, "a": A}, {"b": B + 10, "a": A + 10}, id="dict"),
        pytest.param(OrderedDict(b=B, a=A), OrderedDict(b=B + 10, a=A + 10), id="OrderedDict"),
        pytest.param(defaultdict(list, {"a": [A]}), defaultdict(list, {"a": [A + 10]}), id="defaultdict"),
        pytest.param(Point(A, "l"), Point(A + 10, "l"), id="named_tuple"),
        pytest.param(Output(A, "rest"), Output(A + 10, "rest"), id="dataclass"),
        pytest.param(FrozenOutput((A, B)), FrozenOutput((A + 10, B + 10)), id="frozen_dataclass"),
        pytest.param(
            {"a": [Output(FrozenOutput(A), (B,))]}, {"a": [Output(FrozenOutput(A + 10), (B + 10,))]}, id="nested"
        ),
        pytest.param([], [], id="nothing"),
        pytest.param(None, None, id="None"),
        pytest.param(Output, Output, id="class_of_a_dataclass"),
    ],
)
def test_function_is_applied_to_every_tensor_and_to_nothing_else(tree: Any, expected: Any) -> None:
    mapped = map_tensors(lambda tensor: tensor + 10, tree)
    assert type(mapped) is type(tree)
    assert mapped == expected


def test_tree_that_was_mapped_is_as_it_was() -> None:
    inner = [A, {"b": B}]
    tree = {"list": inner, "output": Output(C, inner)}
    mapped = map_tensors(lambda tensor: tensor + 10, tree)
    assert tree["list"] is inner
    assert inner == [A, {"b": B}]
    assert tree["output"] == Output(C, inner)
    assert mapped["output"] is not tree["output"]
    assert mapped["list"] is not inner


def test_what_is_no_container_is_passed_on_itself() -> None:
    module, array = nn.Linear(1, 1), object()
    mapped = map_tensors(lambda tensor: tensor + 10, (module, array, {1, 2}))
    assert mapped[0] is module
    assert mapped[1] is array
    assert mapped[2] == {1, 2}


def test_parameter_counts_as_a_tensor() -> None:
    parameter = nn.Parameter(A.clone())
    assert tensors_in([parameter]) == [parameter]
    assert map_tensors(torch.zeros_like, {"p": parameter})["p"] == 0


def test_dataclass_keeps_what_is_no_field_and_is_not_built_again() -> None:
    output = CountedOutput(A)
    output.total, output.note = B, "kept"  # type: ignore[attr-defined]
    mapped = map_tensors(lambda tensor: tensor + 10, output)
    assert type(mapped) is CountedOutput
    assert (mapped.hidden, mapped.total, mapped.note, mapped.built) == (A + 10, B + 10, "kept", 1)
    assert (output.hidden, output.total) == (A, B)


def test_field_that_was_never_set_is_left_out() -> None:
    output = Output(A)
    del output.rest
    output.__class__ = dataclasses.make_dataclass("Unset", ["hidden", "rest"])
    mapped = map_tensors(lambda tensor: tensor + 10, output)
    assert mapped.hidden == A + 10
    assert not hasattr(mapped, "rest")
    assert tensors_in(output) == [A]


def test_function_may_return_anything() -> None:
    assert map_tensors(lambda tensor: tensor.item(), {"a": (A, Output(B))}) == {"a": (0.0, Output(1.0))}


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(C, id="tensor"),
        pytest.param([B, (A, C), "x"], id="list"),
        pytest.param({"b": B, "a": A}, id="dict"),
        pytest.param({"x": [FrozenOutput(C, Output([A], B))]}, id="dataclass"),
        pytest.param(((A, B), {"k": 1.5}), id="arguments"),
        pytest.param(3, id="number"),
    ],
)
def test_tensors_are_found_in_the_order_of_mapping(tree: Any) -> None:
    mapped: list[Tensor] = []
    map_tensors(mapped.append, tree)
    found = tensors_in(tree)
    assert len(found) == len(mapped)
    assert all(left is right for left, right in zip(found, mapped, strict=True))


def test_tensor_that_is_there_twice_is_found_twice() -> None:
    assert [id(tensor) for tensor in tensors_in((A, [A]))] == [id(A), id(A)]
