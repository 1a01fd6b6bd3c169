from typing import Any

import pytest
import torch
from torch import nn

from mm_lightning.models import mlp_blocks


def widths(blocks: Any) -> list[tuple[int, int]]:
    layers = [module for block, _ in blocks for module in block if isinstance(module, nn.Linear)]
    return [(layer.in_features, layer.out_features) for layer in layers]


@pytest.mark.parametrize(
    "sizes", [[None, 5, None], [12, 5, None], [None, 5, 4], [12, 5, 4]], ids=["both", "last", "first", "none"]
)
def test_sizes_left_open_are_those_of_the_data(sizes: list[int | None]) -> None:
    blocks = mlp_blocks(sizes, input_shape=[3, 2, 2], num_classes=4)
    assert widths(blocks) == [(12, 5), (5, 4)]
    assert nn.Sequential(*(block for block, _ in blocks))(torch.zeros(7, 3, 2, 2)).shape == (7, 4)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (
            [784, 5, 4],
            {"input_shape": (2,)},
            r"sizes begin with 784, but .* has 2 numbers \(shape \(2,\)\)\. Begin with 2",
        ),
        ([12, 5, 10], {"num_classes": 4}, r"sizes end with 10, but the data have 4 classes\. End with 4"),
        ([None, 5, 4], {}, r"got \[None, 5, 4\]\. Null is read from data that have input_shape and num_classes"),
        ([12, None, 4], {"input_shape": (12,)}, r"got \[12, None, 4\]"),
        ([12, 0, 4], {}, r"at least two numbers of units >= 1, got \[12, 0, 4\]"),
        ([None], {"num_classes": 4}, r"at least two numbers of units >= 1, got \[None\]"),
    ],
    ids=["input", "classes", "unknown", "hidden", "zero", "one"],
)
def test_sizes_that_are_not_those_of_the_data_are_refused(
    sizes: list[int | None], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mlp_blocks(sizes, **settings)
