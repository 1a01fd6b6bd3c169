import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_lightning.data import HuggingFaceDataModule

datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")

X = np.random.default_rng(0).normal(3, 2, (60, 2))
Y = np.arange(60) % 3
NAMES = ["cat", "ant", "bee"]
COLUMNS = {"a": X[:, 0], "b": X[:, 1], "y": Y, "text": [NAMES[k] for k in Y], "both": X.tolist()}
PLAIN = {"size": 8, "crop_padding": 0, "flip": False, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def saved(folder: Path, made: Any) -> Path:
    made.save_to_disk(str(folder / "set"))
    return folder / "set"


def table(**more: Any) -> Any:
    return datasets.Dataset.from_dict({**COLUMNS, **more})


def set_up(path: Path, **settings: Any) -> HuggingFaceDataModule:
    data = HuggingFaceDataModule(path, **settings)
    data.setup()
    return data


def rows_of(data: HuggingFaceDataModule) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    return {name: tuple(map(torch.cat, zip(*loader, strict=True))) for name, loader in loaders.items()}


@pytest.mark.parametrize("inputs", [["a", "b"], "both"], ids=["columns", "arrays"])
def test_numbers_are_split_and_keep_their_labels(inputs: Any, tmp_path: Path) -> None:
    data = set_up(saved(tmp_path, table()), inputs=inputs, target="text", standardize=False)
    assert (data.num_classes, data.class_names, data.input_shape) == (3, ("ant", "bee", "cat"), (2,))
    found = rows_of(data)
    assert {name: len(targets) for name, (_, targets) in found.items()} == {"train": 48, "val": 6, "test": 6}
    rows = {tuple(x): t for inputs, targets in found.values() for x, t in zip(inputs.tolist(), targets, strict=True)}
    assert rows == {tuple(x): (2, 0, 1)[y] for x, y in zip(X.astype(np.float32).tolist(), Y, strict=True)}


def test_numbers_are_standardised_by_the_training_rows(tmp_path: Path) -> None:
    train, _ = rows_of(set_up(saved(tmp_path, table()), inputs=["a", "b"], target="y"))["train"]
    torch.testing.assert_close(train.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(train.square().mean(0), torch.ones(2), rtol=0, atol=1e-5)


def test_splits_of_a_dict_stay_and_class_labels_have_their_names(tmp_path: Path) -> None:
    made = table().cast_column("y", datasets.ClassLabel(names=NAMES))
    path = saved(tmp_path, datasets.DatasetDict(train=made, validation=made.select([1, 4, 7])))
    data = set_up(path, inputs=["a"], target="y", standardize=False)
    assert data.class_names == ("ant", "bee", "cat")
    found = rows_of(data)
    assert (len(found["train"][1]), len(found["test"][1])) == (54, 6)
    assert found["val"][1].tolist() == [0, 0, 0]
    torch.testing.assert_close(found["val"][0][:, 0], torch.from_numpy(X[[1, 4, 7], 0]).float())


def images() -> Any:
    pictures = [Image.new("RGB", (5, 9), (4 * i, 0, 10)) for i in range(60)]
    features = datasets.Features({"image": datasets.Image(), "y": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": pictures, "y": Y}, features=features)


def test_images_are_decoded_resized_and_normalised(tmp_path: Path) -> None:
    data = set_up(saved(tmp_path, images()), inputs="image", target="y", **PLAIN)
    assert (data.num_classes, data.input_shape) == (3, (3, 8, 8))
    reds = {}
    for pixels, targets in rows_of(data).values():
        for image, target in zip(pixels, targets.tolist(), strict=True):
            assert image.shape == (3, 8, 8)
            reds[round(float(image[0, 0, 0]) * 255)] = target
    assert reds == {4 * i: int(Y[i]) for i in range(60)}


def test_corrupt_images_are_counted(tmp_path: Path) -> None:
    content = images().cast_column("image", datasets.Image(decode=False)).to_dict()
    content["image"][7]["bytes"] = b"no image"
    features = datasets.Features({"image": datasets.Image(), "y": datasets.Value("int64")})
    path = saved(tmp_path, datasets.Dataset.from_dict(content, features=features))
    with pytest.warns(UserWarning, match=r"1 of 60 images cannot be decoded: row 7 "):
        data = set_up(path, inputs="image", target="y", **PLAIN)
    assert sum(len(targets) for _, targets in rows_of(data).values()) == 59


@pytest.mark.parametrize(
    ("columns", "settings", "error", "message"),
    [
        ({}, {"inputs": None}, ValueError, r"Which columns .*data\.inputs=.*, of: a, b, y, text, both\."),
        ({}, {"target": "yy"}, ValueError, r"no column 'yy'\. Did you mean 'y'"),
        ({}, {"inputs": ["a", "aa"]}, ValueError, r"no column 'aa'\. Did you mean 'a'"),
        ({}, {"inputs": ["y"]}, ValueError, r"columns other than the target 'y'"),
        ({}, {"inputs": ["text"]}, TypeError, r"'text' must hold numbers, got the type <U3"),
        ({}, {"inputs": ["a", "both"]}, ValueError, r"each must be one number a row, 'both' is \(60, 2\)"),
        ({}, {"inputs": "b", "target": "a"}, TypeError, r"a must be integers or text, got "),
        ({"a": [None, *X[1:, 0]]}, {}, ValueError, r"'a' is missing in 1 rows"),
        ({"y": [None, *Y[1:]]}, {}, ValueError, r"y is missing in 1 of 60 rows"),
        (
            {"both": [[1.0]] * 59 + [[1.0, 2.0]]},
            {"inputs": "both"},
            ValueError,
            r"rows of 'both' have different shapes",
        ),
    ],
    ids=[
        *("no inputs", "target", "input", "target as input", "text", "arrays and numbers", "fractions"),
        *("missing input", "missing label", "ragged"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(
    columns: dict[str, Any], settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, table(**columns))
    with pytest.raises(error, match=message):
        set_up(path, **{"inputs": ["a", "b"], "target": "y", **settings})


def test_rows_without_a_class_label_are_refused(tmp_path: Path) -> None:
    made = table().cast_column("y", datasets.ClassLabel(names=NAMES))
    hidden = datasets.Dataset.from_dict({**COLUMNS, "y": [-1] * 60}, features=made.features)
    path = saved(tmp_path, datasets.DatasetDict(train=made, test=hidden))
    with pytest.raises(ValueError, match=r"test: y is missing in 60 of 60 rows\. Leave that split out\."):
        set_up(path, inputs=["a"], target="y")


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"path must be a folder that save_to_disk .*Give data\.path=FOLDER\."):
        HuggingFaceDataModule()
    with pytest.raises(FileNotFoundError, match=r"path 'nothing' does not exist"):
        HuggingFaceDataModule("nothing")
    with pytest.raises(ValueError, match=r"cannot be loaded .*Write it with save_to_disk"):
        set_up(tmp_path, inputs="a", target="y")
    path = saved(tmp_path, datasets.DatasetDict(some=table()))
    with pytest.raises(ValueError, match=r"holds the splits 'some', but no 'train'"):
        set_up(path, inputs="a", target="y")


def test_without_datasets_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, table())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"^data=hf needs Hugging Face's datasets: pip install mm-lightning\[hf\]\.$"):
        set_up(path, inputs="a", target="y")
