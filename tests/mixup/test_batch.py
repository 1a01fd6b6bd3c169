"""The rows of batches: told by what most parts share, reordered in every part, and never written into."""

from __future__ import annotations

import collections
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mm_lightning.mixup.batch import guess_layout, layouts, map_leaves, signature_of

ORDER = torch.tensor([2, 0, 1])
X = torch.arange(12.0).view(3, 4)
Pair = collections.namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A batch that refuses to be written into."""

    x: torch.Tensor
    names: list[str]


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ((X, torch.zeros(3)), 3),
        ({"x": X, "y": torch.zeros(3), "weights": torch.zeros(7)}, 3),
        ({"image": X, "label": torch.zeros(3), "boxes": [torch.zeros(n, 4) for n in (5, 5, 5)]}, 3),
        ({"image": X, "label": torch.zeros(3), "boxes": [torch.zeros(n, 4) for n in (1, 2, 6)]}, 3),
        ([[X, X], [torch.zeros(3), torch.zeros(3)]], 3),
        ((X, ["a", "b", "c"]), 3),
        ((torch.zeros(()), X), 3),
        (torch.zeros(0, 4), 0),
    ],
)
def test_the_number_of_rows_is_the_length_that_most_parts_share(batch: Any, rows: int) -> None:
    assert guess_layout(batch).rows_of(batch) == rows


def test_a_given_size_is_taken_and_may_stand_second() -> None:
    first, second = layouts((torch.zeros(5, 3), torch.zeros(3, 3)), 3)
    assert [layout.rows_of(None) for layout in (first, second)] == [3, 3]
    assert [layout.dim_of(torch.zeros(5, 3), 3) for layout in (first, second)] == [1, 1]
    assert [layout.dim_of(torch.zeros(3, 3), 3) for layout in (first, second)] == [0, 1]


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        ((X, [10, 11, 12]), (X[[2, 0, 1]], [12, 10, 11])),
        ((X, ("a", "b", "c")), (X[[2, 0, 1]], ("c", "a", "b"))),
        ({"x": X, "n": np.array([1, 2, 3]), "k": 5}, {"x": X[[2, 0, 1]], "n": np.array([3, 1, 2]), "k": 5}),
        (Pair(X, torch.tensor([1, 2, 3])), Pair(X[[2, 0, 1]], torch.tensor([3, 1, 2]))),
        (Frozen(X, ["a", "b", "c"]), Frozen(X[[2, 0, 1]], ["c", "a", "b"])),
        (SimpleNamespace(x=X, scale=torch.ones(2)), SimpleNamespace(x=X[[2, 0, 1]], scale=torch.ones(2))),
        ((X, torch.arange(6).view(2, 3)), (X[[2, 0, 1]], torch.tensor([[2, 0, 1], [5, 3, 4]]))),
    ],
)
def test_every_part_with_rows_is_reordered_and_the_batch_stays(batch: Any, wanted: Any) -> None:
    before = {id(part): part.clone() for part in _tensors(batch)}
    got = guess_layout(batch).permuted(batch, ORDER)
    assert type(got) is type(wanted)
    for one, other in zip(_parts(got), _parts(wanted), strict=True):
        if isinstance(other, (torch.Tensor, np.ndarray)):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        else:
            assert one == other
    assert all(torch.equal(part, before[id(part)]) for part in _tensors(batch))


def test_what_stays_alike_is_not_copied_and_one_tensor_stays_one() -> None:
    batch = {"x": X, "again": X, "rest": [1, 2]}
    assert map_leaves(lambda leaf: leaf, batch) is batch
    moved = map_leaves(lambda leaf: leaf + 1, batch)
    assert moved["x"] is moved["again"]
    assert moved["rest"] is batch["rest"]


def test_a_batch_that_holds_itself_is_walked_once() -> None:
    batch: dict[str, Any] = {"x": X}
    batch["self"] = batch
    assert map_leaves(lambda leaf: leaf + 1, batch)["x"].equal(X + 1)


def test_batches_used_alike_have_one_signature() -> None:
    small, large = {"x": X, "boxes": [X]}, {"x": X[:2], "boxes": [X, X[:1]]}
    assert signature_of(small) == signature_of(large)
    assert signature_of({"x": X.long(), "boxes": [X]}) != signature_of(small)
    assert signature_of((X, X)) == signature_of((X[:1], X[:1]))
    assert signature_of((X, X)) != signature_of((X, X[:, 0]))


@pytest.mark.parametrize("batch", [[1, 2, 3], {"a": "b"}, None, torch.zeros(())])
def test_a_batch_without_rows_is_refused(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"needs tensors in the batch, got {type(batch).__name__} without any"):
        guess_layout(batch)


def test_a_batch_of_another_form_is_refused() -> None:
    layout = guess_layout({"x": X})
    with pytest.raises(TypeError, match=r"number of rows by what the batch has at \['x'\].*batch_size="):
        layout.rows_of({"y": X})


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return list(batch.values())
    return list(vars(batch).values()) if hasattr(batch, "__dict__") else list(batch)


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [part for part in _parts(batch) if isinstance(part, torch.Tensor)]
