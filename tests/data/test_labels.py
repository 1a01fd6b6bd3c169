from typing import Any

import numpy as np
import pytest
import torch

from mm_lightning.data.labels import check_classes, encode_labels


@pytest.mark.parametrize(
    ("labels", "indices", "names"),
    [
        (["dog", "cat", "emu", "cat"], [1, 0, 2, 0], ("cat", "dog", "emu")),
        (np.array(["dog", "cat"], dtype=object), [1, 0], ("cat", "dog")),
        (np.array([b"b", b"a"]), [1, 0], ("a", "b")),
        (["Zoe", "adam", "10", "9"], [2, 3, 0, 1], ("10", "9", "Zoe", "adam")),  # text as text
        ([10, 9, 10], [1, 0, 1], ("9", "10")),  # integers as numbers
        (np.array([0, 2, 1, 0], dtype=np.uint8), [0, 2, 1, 0], ("0", "1", "2")),
        ([True, False], [1, 0], ("False", "True")),
    ],
    ids=["text", "objects", "bytes", "order of text", "order of integers", "indices", "truth values"],
)
def test_classes_are_numbered_in_the_order_of_their_names(labels: Any, indices: list[int], names: Any) -> None:
    got, got_names = encode_labels(labels, "y")
    assert (got.dtype, got.tolist(), got_names) == (torch.int64, indices, names)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0.5, 1.0], TypeError, r"y must be integers or text, got 0\.5 of type float64\. Convert"),
        ([0.0, float("nan")], ValueError, r"y is missing in 1 of 2 rows"),
        (np.array(["a", None, "b"], dtype=object), ValueError, r"y is missing in 1 of 3 rows"),
        (np.array(["a", float("nan")], dtype=object), ValueError, r"y is missing in 1 of 2 rows"),
        (np.array(["a", 1], dtype=object), TypeError, r"y mixes the types int, str\."),
        (np.eye(3, dtype=int), ValueError, r"one label for each row, got the shape \(3, 3\)\. .*argmax"),
        ([], ValueError, r"y holds no label\."),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), TypeError, r"y must be integers or text"),
    ],
    ids=["fractions", "nan", "none", "nan in text", "mixed", "one-hot", "empty", "dates"],
)
def test_other_labels_are_refused(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_labels(labels, "y")


def test_one_class_and_a_class_without_training_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have one class, 'a', where two are the least\. Do so\."):
        check_classes({"train": torch.zeros(3, dtype=torch.int64)}, ["a"], "Do so.")
    splits = {"train": torch.tensor([0, 2]), "val": torch.tensor([1, 3])}
    with pytest.raises(ValueError, match=r"No training row has the class 'b', 'd'\. Do so\."):
        check_classes(splits, ["a", "b", "c", "d"], "Do so.")
    check_classes({**splits, "train": torch.arange(4)}, ["a", "b", "c", "d"], "Do so.")
