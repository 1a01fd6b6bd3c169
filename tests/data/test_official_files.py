"""The official files of the data sets: read whatever form they are there in, downloaded, or refused."""

from __future__ import annotations

import errno
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_files import (
    KINDS,
    TEST,
    TRAIN,
    as_official,
    contents,
    extract,
    held,
    labels,
    packed,
    pixels,
    write_official,
)
from torch import Tensor

from mm_lightning.data import OfficialDataModule

NAMES = ["cifar10", "cifar100", "svhn", "tiny_imagenet"]
EXTRACTED = ["cifar10", "cifar100", "tiny_imagenet"]


def expected(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What the files hold."""
    found = {}
    for split, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        images, targets = torch.from_numpy(pixels(count, seed)), torch.from_numpy(labels(count).astype(np.int64))
        if name == "tiny_imagenet":  # a grey image each
            images = images[:, :1, :1, :1].expand(-1, 3, 64, 64)
            if split == "train":  # the classes take turns, each by the names of its files
                of_each = [sorted(range(k, count, 10), key=lambda i: f"{i}.JPEG") for k in range(10)]
                order = [of_each[k][turn] for turn in range(count // 10) for k in range(10)]
                images, targets = images[order], targets[order]
        found[split] = images, targets + (90 if name == "cifar100" else 0)
    return found


def assert_holds(data: OfficialDataModule, name: str) -> None:
    wanted, found = expected(name), held(data)
    tolerance = 2 if name == "tiny_imagenet" else 0  # of JPEG
    for split in ("train", "test"):
        images, targets = found[split]
        assert (images.dtype, targets.dtype) == (torch.uint8, torch.int64)
        assert (images.int() - wanted[split][0].int()).abs().max() <= tolerance
        assert torch.equal(targets, wanted[split][1])


@pytest.mark.parametrize("name", NAMES)
def test_the_official_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = KINDS[name](write_official(monkeypatch, name, tmp_path), num_validation=0)
    data.setup()
    assert_holds(data, name)
    assert data.input_shape == tuple(held(data)["train"][0].shape[1:])
    assert data.class_names is not None
    assert len(data.class_names) == data.num_classes
    shown = {"cifar10": ("airplane", "truck"), "cifar100": ("class0", "class99"), "svhn": ("0", "9")}
    assert (data.class_names[0], data.class_names[-1]) == shown.get(name, ("n00000000", "n00000199"))


@pytest.mark.parametrize("name", EXTRACTED)
def test_extracted_files_are_read_where_the_archive_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_official(monkeypatch, name, packed(name, contents(name)))
    data = KINDS[name](extract(name, tmp_path), num_validation=0)
    data.prepare_data()
    data.setup()
    assert_holds(data, name)


def test_what_is_known_of_the_official_files_is_complete() -> None:
    for kind in KINDS.values():
        for file in kind.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.size > 60_000_000
            assert file.name in file.url.split("/")
    counts = {name: (kind.num_train, kind.num_test, kind.num_classes) for name, kind in KINDS.items()}
    assert counts == {
        "cifar10": (50_000, 10_000, 10),
        "cifar100": (50_000, 10_000, 100),
        "svhn": (73_257, 26_032, 10),
        "tiny_imagenet": (100_000, 10_000, 200),
    }


# --- files that are not there, or not the official ones


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the folder ``there``."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "there").mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "there")))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_downloaded_if_that_is_asked_for(
    name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = packed(name, contents(name))
    as_official(monkeypatch, name, files, server)
    for file, content in files.items():
        (tmp_path / "there" / file).write_bytes(content)
    data = KINDS[name](tmp_path / "here", download=True, num_validation=0)
    data.prepare_data()
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == files
    data.setup()
    assert_holds(data, name)
    for file in files:
        (tmp_path / "there" / file).unlink()
    again = KINDS[name](tmp_path / "here", num_validation=0)
    again.prepare_data()
    again.setup()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar10",
            r"lacks cifar-10-binary\.tar\.gz \(or the folder cifar-10-batches-bin\)\. Put them there, from http",
        ),
        ("cifar100", r"lacks cifar-100-binary\.tar\.gz \(or the folder cifar-100-binary\)\. .*\(169 MB\)"),
        ("svhn", r"lacks train_32x32\.mat and test_32x32\.mat\. .* or add data\.download=true \(246 MB\)\."),
        ("tiny_imagenet", r"lacks tiny-imagenet-200\.zip \(or the folder tiny-imagenet-200\)\."),
    ],
)
def test_missing_files_are_named_with_what_to_do(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        KINDS[name](tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_to_be_downloaded_and_was_not_is_missing(tmp_path: Path) -> None:
    data = KINDS["svhn"](tmp_path, download=True)
    with pytest.raises(FileNotFoundError, match=r"lacks train_32x32\.mat and test_32x32\.mat\. Put them there"):
        data.setup()  # without prepare_data


def test_one_of_two_files_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(monkeypatch, "svhn", tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train_32x32"):
        KINDS["svhn"](tmp_path, num_validation=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_the_official_one_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(monkeypatch, name, tmp_path)
    path = tmp_path / KINDS[name].files[0].name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    data = KINDS[name](tmp_path, num_validation=0, download=True)
    data.prepare_data()  # which does not replace what somebody has put there
    with pytest.raises(ValueError, match=rf"{path.name} is not the official file: expected SHA-256"):
        data.setup()


@pytest.mark.parametrize(
    ("name", "file", "length"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_3.bin", 24_484),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", 24_585),  # as many images, all but the first shifted
        ("cifar10", "cifar-10-batches-bin/test_batch.bin", 0),
        ("cifar100", "cifar-100-binary/train.bin", 122_959),
    ],
)
def test_extracted_files_that_end_within_an_image_are_refused(
    name: str, file: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_official(monkeypatch, name, packed(name, contents(name)))
    path = extract(name, tmp_path) / file
    path.write_bytes((path.read_bytes() + b"x")[:length])
    message = rf"{path.name} holds {length:,} bytes, which are no whole images of 3,07\d"
    with pytest.raises(ValueError, match=rf"{message}\. Extract it again, or put cifar.*binary\.tar\.gz into"):
        KINDS[name](tmp_path, num_validation=0).setup()


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_3.bin", "holds 39 training images of 40"),
        ("cifar100", "cifar-100-binary/test.bin", "holds 19 test images of 20"),
    ],
)
def test_extracted_files_that_end_too_early_are_refused(
    name: str, file: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_official(monkeypatch, name, packed(name, contents(name)))
    path = extract(name, tmp_path) / file
    path.write_bytes(path.read_bytes()[: -3073 if name == "cifar10" else -3074])
    with pytest.raises(ValueError, match=rf"{message}\. Extract it again, or put cifar.*binary\.tar\.gz into"):
        KINDS[name](tmp_path, num_validation=0).setup()


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("cifar10", "cifar-10-batches-bin/test_batch.bin", r"holds no test_batch\.bin\. Extract it again"),
        ("tiny_imagenet", "tiny-imagenet-200/wnids.txt", r"lacks tiny-imagenet-200/wnids\.txt\."),
        ("tiny_imagenet", "tiny-imagenet-200/val/images/val_7.JPEG", r"1 of 20 images cannot be read, .*val_7\.JPEG"),
        ("tiny_imagenet", "tiny-imagenet-200/train/n00000001/images/n00000001_1.JPEG", "holds 39 training images"),
    ],
)
def test_extracted_files_that_are_missing_are_named(
    name: str, file: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_official(monkeypatch, name, packed(name, contents(name)))
    (extract(name, tmp_path) / file).unlink()
    with pytest.raises(ValueError, match=message):
        KINDS[name](tmp_path, num_validation=0).setup()


@pytest.mark.parametrize(("name", "last"), [("cifar10", 9), ("cifar100", 99)])
def test_labels_beyond_the_classes_are_refused(
    name: str, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_official(monkeypatch, name, packed(name, contents(name)))
    kind = KINDS[name]
    path = extract(name, tmp_path) / kind.extracted / kind.test_file
    content = bytearray(path.read_bytes())
    content[kind.num_labels - 1] = last + 1
    path.write_bytes(content)
    text = rf"{kind.extracted} holds the label {last + 1} of a test image, where {last} is the last\. Extract it again"
    with pytest.raises(ValueError, match=text):
        kind(tmp_path, num_validation=0).setup()


def test_classes_that_are_not_named_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_official(monkeypatch, "tiny_imagenet", packed("tiny_imagenet", contents("tiny_imagenet")))
    path = extract("tiny_imagenet", tmp_path) / "tiny-imagenet-200" / "wnids.txt"
    path.write_text(path.read_text().replace("n00000003", ""))
    with pytest.raises(
        ValueError, match=r"has images of the class 'n00000003', which wnids\.txt does not name\. Extract"
    ):
        KINDS["tiny_imagenet"](tmp_path, num_validation=0).setup()


def test_files_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(monkeypatch, "cifar10", tmp_path)
    data, path = KINDS["cifar10"](tmp_path, num_validation=0), tmp_path / "cifar-10-binary.tar.gz"

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(data, "read", refused)
    with pytest.raises(OSError, match=rf"{path} cannot be read \(Permission denied\)\. Let this user read it") as told:
        data.setup()
    assert told.value.errno is None  # or the command would tell to choose another folder for the run


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("svhn", "scipy.io", r"data=svhn needs scipy: pip install mm-lightning\[report\]"),
        ("tiny_imagenet", "PIL", r"needs Pillow: pip install mm-lightning\[report\]"),
    ],
)
def test_a_missing_package_is_told_before_a_download(
    name: str, module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        KINDS[name](tmp_path, download=True)


@pytest.mark.parametrize("download", [False, True])
def test_the_file_itself_is_no_root(download: bool, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"")
    text = rf"root must be the folder of cifar-10-binary\.tar\.gz, got the file '{path}'\. Give its folder\."
    with pytest.raises(ValueError, match=text):
        KINDS["cifar10"](path, download=download)


def test_a_file_that_scipy_cannot_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    files = {"train_32x32.mat": b"MATLAB 5.0 MAT-file" + bytes(200), "test_32x32.mat": b""}
    as_official(monkeypatch, "svhn", files)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"train_32x32\.mat cannot be read \(.*\)\. Get it again\."):
        KINDS["svhn"](tmp_path, num_validation=0).setup()
