"""What is said of an argument that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from mm_lightning.arguments import check_flag, check_integer, check_number, is_flag, plain


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        ("1", TypeError, "'1' of type str"),
        (None, TypeError, "None of type NoneType"),
        (True, TypeError, "True of type bool"),
        (np.bool_(True), TypeError, f"{np.True_!r} of type {np.bool_.__name__}"),
        (1j, TypeError, "1j of type complex"),
        (-1, ValueError, "-1"),
        (np.float32(-0.5), ValueError, repr(np.float32(-0.5))),
        (float("nan"), ValueError, "nan"),
    ],
)
def test_what_is_no_such_number_is_refused(value: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error) as refusal:
        check_number("share", value, "a number >= 0", lambda number: number >= 0, "0 is none.")
    assert str(refusal.value) == f"share must be a number >= 0, got {got}. 0 is none."


@pytest.mark.parametrize("value", [0, 2.5, np.float32(1.0), np.float16(1.0), np.int64(3)])
def test_numbers_of_python_and_numpy_are_taken(value: Any) -> None:
    check_number("share", value, "a number >= 0", lambda number: number >= 0, "0 is none.")


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (1.0, TypeError, "1.0 of type float"),
        (np.float32(1.0), TypeError, f"{np.float32(1.0)!r} of type float32"),
        (False, TypeError, "False of type bool"),
        (-1, ValueError, "-1"),
    ],
)
def test_what_is_no_such_integer_is_refused(value: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error) as refusal:
        check_integer("count", value, "an integer >= 0", lambda number: number >= 0, "0 is none.")
    assert str(refusal.value) == f"count must be an integer >= 0, got {got}. 0 is none."


@pytest.mark.parametrize("value", [0, np.int64(3), np.uint8(3)])
def test_integers_of_python_and_numpy_are_taken(value: Any) -> None:
    check_integer("count", value, "an integer >= 0", lambda number: number >= 0, "0 is none.")


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        (False, True),
        (np.bool_(False), True),
        (torch.tensor(True), True),
        (torch.tensor([True]), False),
        (torch.tensor(1), False),
        (1, False),
        ("yes", False),
        (None, False),
    ],
)
def test_flags_are_booleans_of_python_numpy_and_torch(value: Any, is_one: bool) -> None:
    assert is_flag(value) is is_one
    if is_one:
        check_flag("strict", value, "False warns.")
    else:
        with pytest.raises(TypeError) as refusal:
            check_flag("strict", value, "False warns.")
        kind = type(value).__name__
        assert str(refusal.value) == f"strict must be True or False, got {value!r} of type {kind}. False warns."


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (OmegaConf.create(["a", "b"]), ["a", "b"]),
        (OmegaConf.create({"a": 1}), {"a": 1}),
        (("a", 1), ["a", 1]),
        ((number for number in (1, 2)), [1, 2]),
        (np.array([1.0, 2.0], np.float32), [1.0, 2.0]),
        (torch.tensor([1, 2]), [1, 2]),
        ("ab", "ab"),
        (3, 3),
        (None, None),
    ],
    ids=["ListConfig", "DictConfig", "tuple", "generator", "array", "tensor", "str", "int", "None"],
)
def test_what_holds_several_becomes_a_list_or_dict(value: Any, wanted: Any) -> None:
    assert plain(value) == wanted
    assert type(plain(value)) is type(wanted)


@pytest.mark.parametrize("value", [nn.Sequential(nn.Linear(1, 1)), nn.Sequential, len], ids=["module", "class", "loss"])
def test_modules_and_functions_stay_whole(value: Any) -> None:
    assert plain(value) is value


def test_numbers_of_an_array_become_those_of_python() -> None:
    assert [type(number) for number in plain(np.array([1.0, 2.0]))] == [float, float]
