import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm_lightning.data import ArraysDataModule

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, size=(60, 4))
Y = np.arange(60) % 3


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def set_up(path: Path, **settings: Any) -> ArraysDataModule:
    data = ArraysDataModule(path, **settings)
    data.setup()
    return data


def tensors(data: ArraysDataModule) -> dict[str, tuple[torch.Tensor, ...]]:
    return {
        "train": data.train_dataloader().tensors,
        "val": data.val_dataloader().tensors,
        "test": data.test_dataloader().tensors,
    }


def test_arrays_are_split_and_every_row_keeps_its_label(tmp_path: Path) -> None:
    data = set_up(saved(tmp_path, x=X, y=Y), standardize=False)
    assert (data.num_classes, data.class_names, data.input_shape) == (3, ("0", "1", "2"), (4,))
    found = tensors(data)
    assert {name: len(targets) for name, (_, targets) in found.items()} == {"train": 48, "val": 6, "test": 6}
    label_of = {tuple(row): int(label) for row, label in zip(X.astype(np.float32).tolist(), Y, strict=True)}
    rows = [(tuple(row), int(label)) for x, y in found.values() for row, label in zip(x.tolist(), y, strict=True)]
    assert dict(rows) == label_of
    assert found["train"][0].dtype == torch.float32
    assert found["train"][1].dtype == torch.int64


def test_features_have_mean_0_and_deviation_1_in_training(tmp_path: Path) -> None:
    x = np.concatenate([X, np.full((60, 1), 1e6)], axis=1)
    plain, scaled = (set_up(saved(tmp_path, x=x, y=Y), standardize=on) for on in (False, True))
    train = tensors(plain)["train"][0].double()
    mean = train.sum(0) / 48
    deviation = ((train - mean) ** 2).sum(0).div(48).sqrt()
    deviation[4] = 1
    for name in ("train", "val", "test"):
        expected = (tensors(plain)[name][0].double() - mean) / deviation
        torch.testing.assert_close(tensors(scaled)[name][0].double(), expected, rtol=0, atol=1e-5)
    assert tensors(scaled)["test"][0][:, 4].tolist() == [0.0] * 6  # a constant stays one


def test_inputs_of_more_dimensions_share_one_mean(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (60, 2, 3), dtype=np.uint8)
    data = set_up(saved(tmp_path, x=x, y=Y))
    assert data.input_shape == (2, 3)
    train = tensors(data)["train"][0].double()
    assert float(train.mean()) == pytest.approx(0, abs=1e-6)
    assert float(train.square().mean()) == pytest.approx(1, abs=1e-5)
    assert float(train.mean(0).abs().max()) > 1e-3


def test_splits_of_the_file_stay_and_text_is_numbered_over_all_of_them(tmp_path: Path) -> None:
    names = np.array(["cat", "dog", "emu"])
    arrays = {"x_train": X[:40], "y_train": names[Y[:40]], "x_valid": X[40:], "y_valid": names[np.full(20, 1)]}
    data = set_up(saved(tmp_path, **arrays), standardize=False)
    assert data.class_names == ("cat", "dog", "emu")
    found = tensors(data)
    assert found["val"][1].tolist() == [1] * 20
    assert torch.equal(found["val"][0], torch.from_numpy(X[40:].astype(np.float32)))
    assert (len(found["train"][1]), len(found["test"][1])) == (36, 4)


def test_the_split_does_not_follow_the_seed_unless_asked(tmp_path: Path) -> None:
    path = saved(tmp_path, x=X, y=Y)
    tests = [
        tensors(set_up(path, standardize=False, **settings))["test"][0].tolist()
        for settings in ({"seed": 0}, {"seed": 1}, {"seed": 1, "data_seed": None}, {"data_seed": 1})
    ]
    assert tests[0] == tests[1] != tests[2] == tests[3]


BAD = X.copy()
BAD[3, 1], BAD[5, 0] = np.nan, np.inf


@pytest.mark.parametrize(
    ("arrays", "settings", "error", "message"),
    [
        ({"a": X, "b": Y}, {}, ValueError, r"holds no 'x' or 'inputs' or 'X', but 'a', 'b'\. .*data\.inputs=\.\.\."),
        ({"x": X, "b": Y}, {}, ValueError, r"holds no 'y' or .*data\.target=\.\.\."),
        ({"x": X, "y": Y}, {"target": "z"}, ValueError, r"holds no 'z', but 'x', 'y'"),
        ({"x": X, "y": Y}, {"inputs": ["x"]}, TypeError, r"inputs must be one key of an \.npz, got \['x'\]"),
        ({"x": X, "y": Y[:9]}, {}, ValueError, r"x has 60 rows, y has 9\."),
        ({"x": X[:, 0], "y": Y}, {}, ValueError, r"x must be \(N, \.\.\.\), .* got the shape \(60,\)"),
        ({"x": BAD, "y": Y}, {}, ValueError, r"x holds 2 values that are NaN or infinite"),
        ({"x": X.astype(str), "y": Y}, {}, TypeError, r"x must hold numbers, got the type <U"),
        ({"x": X, "y": X[:, 0]}, {}, TypeError, r"y must be integers or text, got "),
        ({"x": X, "y": Y * 0}, {}, ValueError, r"have one class, '0'"),
        ({"x": X[:0], "y": Y[:0]}, {}, ValueError, r"holds no label"),
        ({"x_train": X, "y_train": Y, "x_test": X}, {}, ValueError, r"inputs of train, test but labels of train"),
        ({"x_test": X, "y_test": Y}, {}, ValueError, r"holds 'test' but nothing to train on"),
        (
            {"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y},
            {},
            ValueError,
            r"different shapes: \{'train': \(4,\), 'test': \(3,\)\}",
        ),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1},
            {},
            ValueError,
            r"No training row has the class '3'\.",
        ),
        ({"x_train": X, "y_train": Y, "x_val": X[:0], "y_val": Y[:0]}, {}, ValueError, r"'val' has no row"),
    ],
    ids=[
        *("inputs", "target", "named target", "list", "lengths", "one dimension", "nan", "text", "fractions"),
        *("one class", "empty", "half a split", "no train", "shapes", "untrained class", "empty split"),
    ],
)
def test_arrays_that_cannot_be_trained_on_are_refused(
    arrays: dict[str, Any], settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        set_up(saved(tmp_path, **arrays), **settings)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"path must be a file, .*, got None .*Give data\.path=FILE\."):
        ArraysDataModule()
    with pytest.raises(FileNotFoundError, match=r"path 'nothing\.npz' does not exist \(from "):
        ArraysDataModule("nothing.npz")
    other = tmp_path / "x.txt"
    other.write_text("a")
    with pytest.raises(ValueError, match=r"path must end in one of \.npz, \.csv, \.tsv, \.parquet, got '.*x\.txt'"):
        ArraysDataModule(other)
    for name, content in {"a.npz": b"no", "b.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as \.npz .*np\.savez"):
            set_up(tmp_path / name)
    np.savez(tmp_path / "c.npz", x=np.array([{}], dtype=object), y=Y)
    with pytest.raises(ValueError, match=r"c\.npz cannot be read as \.npz"):
        set_up(tmp_path / "c.npz")


# --- tables ----------------------------------------------------------------------------------------------------------


def table(path: Path, columns: dict[str, Any]) -> Path:
    pandas = pytest.importorskip("pandas", reason="tables need pandas")
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        pandas.DataFrame(columns).to_parquet(path)
    else:
        pandas.DataFrame(columns).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


NAMES = np.array(["low", "mid", "high"])[Y]
COLUMNS = {"width": X[:, 0], "count": np.arange(60), "kind": NAMES}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_give_all_columns_but_the_target(suffix: str, tmp_path: Path) -> None:
    data = set_up(table(tmp_path / f"t{suffix}", COLUMNS), target="kind", standardize=False)
    assert (data.num_classes, data.class_names, data.input_shape) == (3, ("high", "low", "mid"), (2,))
    label_of = {int(count): ("high", "low", "mid").index(kind) for count, kind in enumerate(NAMES)}
    rows = {
        int(row[1]): (float(row[0]), int(label))
        for x, y in tensors(data).values()
        for row, label in zip(x, y, strict=True)
    }
    assert rows == {count: (pytest.approx(X[count, 0], abs=1e-6), label) for count, label in label_of.items()}


def test_inputs_of_a_table_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", COLUMNS)
    assert set_up(path, target="kind", inputs=["count"]).input_shape == (1,)
    assert set_up(path, target="kind", inputs="count").input_shape == (1,)


@pytest.mark.parametrize(
    ("columns", "settings", "error", "message"),
    [
        ({}, {"target": None}, ValueError, r"Which column of .*t\.csv holds the classes\? .*: width, count, kind\."),
        ({}, {"target": "kinds"}, ValueError, r"no column 'kinds'\. Did you mean 'kind'\? \(in .*t\.csv\)"),
        ({}, {"inputs": ["qqq"]}, ValueError, r"no column 'qqq'\. There are: 'width', 'count', 'kind'\."),
        ({}, {"inputs": ["kind"]}, ValueError, r"columns other than the target 'kind', got \['kind'\]"),
        ({"city": NAMES}, {}, TypeError, r"hold no numbers: 'city' \(e\.g\. 'low'\)"),
        (
            {"width": [None, None, *X[2:, 0]], "kind": [None, *NAMES[1:]]},
            {},
            ValueError,
            r"of 60 rows, values are missing: 'width' in 2, 'kind' in 1\.",
        ),
        ({"width": [np.inf, *X[1:, 0]]}, {}, ValueError, r"holds 1 values that are NaN or infinite"),
        ({"kind": X[:, 1]}, {}, TypeError, r"kind must be integers or text, got "),
    ],
    ids=["no target", "target", "input", "target as input", "text", "missing", "infinite", "fractions"],
)
def test_tables_that_cannot_be_trained_on_are_refused(
    columns: dict[str, Any], settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = table(tmp_path / "t.csv", {**COLUMNS, **columns})
    with pytest.raises(error, match=message):
        set_up(path, **{"target": "kind", **settings})


def test_a_table_without_pandas_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"\.csv files needs pandas: pip install mm-lightning\[data\]\."):
        set_up(path, target="b")


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="tables need pandas")
    path = tmp_path / "t.csv"
    path.write_text("")
    with pytest.raises(ValueError, match=r"t\.csv cannot be read as \.csv"):
        set_up(path, target="b")
