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
        ([12, 0, 4], {}, r"at least two integers >= 1, got \[12, 0, 4\]"),
        ([None], {"num_classes": 4}, r"at least two integers >= 1, got \[None\]"),
        ([12, "many", 4], {}, r"at least two integers >= 1, got \[12, 'many', 4\]"),
        ([12, 2.5, 4], {}, r"at least two integers >= 1, got \[12, 2\.5, 4\]"),
    ],
    ids=["input", "classes", "unknown", "hidden", "zero", "one", "text", "fraction"],
)
def test_sizes_that_are_not_those_of_the_data_are_refused(
    sizes: list[int | None], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mlp_blocks(sizes, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"sizes": 12},
            TypeError,
            r"sizes must be a list of numbers of units, got 12 of type int\. One is written \[1\]",
        ),
        ({"mix_before": 1}, TypeError, "mix_before must be a list of numbers of blocks, got 1 of type int"),
        ({"mix_before": ["all"]}, ValueError, r"mix_before names the blocks \['all'\], but the blocks are 0 to 1\."),
        ({"mix_before": [0, 2]}, ValueError, r"mix_before names the blocks \[2\], but the blocks are 0 to 1\."),
        ({"negative_slope": "steep"}, TypeError, "negative_slope must be a finite number, got 'steep' of type str"),
        ({"dropout": 0.5}, TypeError, r"dropout must be a list of shares, got 0\.5 of type float"),
        ({"dropout": ["half"]}, ValueError, r"dropout must be 1 numbers in \[0, 1\), .* got \['half'\]"),
        ({"input_shape": 12}, TypeError, "input_shape must be a list of sizes, got 12 of type int"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mlp_blocks(**{"sizes": [12, 5, 4], **settings})
