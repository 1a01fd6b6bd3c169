from typing import Any

import pytest
import torch

from mm_lightning.data.splits import check_shares, complete_splits, split_rows, split_with_names

SHARES = {"test": 0.1, "val": 0.2}


def counts(targets: torch.Tensor, rows: torch.Tensor) -> list[int]:
    return [int((targets[rows] == k).sum()) for k in range(int(targets.max()) + 1)]


def test_each_row_is_in_one_split_and_each_class_gives_its_share() -> None:
    targets = torch.tensor([0] * 50 + [1] * 100 + [2] * 30)[torch.randperm(180, generator=torch.Generator())]
    drawn = split_rows(targets, SHARES, seed=3)
    assert sorted(torch.cat(list(drawn.values())).tolist()) == list(range(180))
    assert counts(targets, drawn["test"]) == [5, 10, 3]
    assert counts(targets, drawn["val"]) == [10, 20, 6]
    assert all(rows.tolist() == sorted(rows.tolist()) for rows in drawn.values())


def test_of_many_small_classes_a_split_gets_its_share_all_the_same() -> None:
    targets = torch.arange(20).repeat_interleave(3)  # a tenth of three rows would be rounded to none
    drawn = split_rows(targets, {"test": 0.1, "val": 0.1}, seed=0)
    assert (len(drawn["test"]), len(drawn["val"]), len(drawn["train"])) == (6, 6, 48)
    assert min(counts(targets, drawn["train"])) >= 1
    assert max(counts(targets, drawn["test"])) == 1


def test_no_class_is_taken_from_the_training_rows_altogether() -> None:
    targets = torch.tensor([0] * 40 + [1])
    drawn = split_rows(targets, {"test": 0.45, "val": 0.45}, seed=0)
    assert counts(targets, drawn["train"])[1] == 1
    assert len(torch.cat(list(drawn.values())).unique()) == 41


def test_the_draw_follows_the_seed_alone() -> None:
    targets = torch.arange(100) % 3
    first, again, other = (split_rows(targets, SHARES, seed=seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test gets none of 4 rows of 2 classes with a share of 0\.1\."):
        split_rows(torch.tensor([0, 0, 1, 1]), SHARES, seed=0)


def test_given_splits_stay_and_missing_ones_are_drawn() -> None:
    targets = {"train": torch.arange(40) % 2, "val": torch.arange(7) % 2}
    found = complete_splits(targets, val_share=0.5, test_share=0.1, seed=0)
    assert {name: (source, len(rows)) for name, (source, rows) in found.items()} == {
        "train": ("train", 36),
        "test": ("train", 4),
        "val": ("val", 7),
    }
    assert found["val"][1].tolist() == list(range(7))


def test_splits_are_known_by_several_names() -> None:
    assert split_with_names({"train": 1, "validation": 2, "more": 3}, "it") == {"train": 1, "val": 2}
    assert split_with_names({"cat": 1, "dog": 2}, "it") == {}
    with pytest.raises(ValueError, match=r"it holds 'val' and 'valid', both of which mean val\."):
        split_with_names({"train": 1, "val": 2, "valid": 3}, "it")
    with pytest.raises(ValueError, match=r"it holds 'test' but nothing to train on\."):
        split_with_names({"test": 1}, "it")


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ((0.0, 0.1), ValueError, r"val_share must be a number in \(0, 1\), got 0\.0"),
        ((0.1, 1), ValueError, r"test_share must be a number in \(0, 1\), got 1"),
        ((0.1, "a"), TypeError, r"test_share must be a number in \(0, 1\), got 'a'"),
    ],
    ids=["none", "all", "text"],
)
def test_impossible_shares_are_refused(shares: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_shares(*shares)


def test_shares_that_are_taken_leave_something_to_train_on() -> None:
    targets = torch.arange(40) % 2
    with pytest.raises(ValueError, match=r"must leave rows to train on, got 0\.5 and 0\.5"):
        complete_splits({"train": targets}, 0.5, 0.5, 0)
    found = complete_splits({"train": targets, "test": targets}, 0.9, 0.1, 0)  # no test is taken
    assert {name: len(rows) for name, (_, rows) in found.items()} == {"train": 4, "val": 36, "test": 40}
