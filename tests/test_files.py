from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from full_disk import no_space

from mm_lightning import files


def test_json_is_read_back(tmp_path: Path) -> None:
    content = {"seed": 3, "metrics": {"test/acc": 0.1 + 0.2}, "git_revision": None, "name": "Größe"}
    files.write_json(tmp_path / "metrics.json", content)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == content
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_json_is_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        files.write_json(tmp_path / "metrics.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "metrics.json").stat().st_mode) == 0o644


def test_full_disk_leaves_the_older_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_json(path, {"older": 1})
    with no_space(), pytest.raises(OSError, match="File too large"):
        files.write_json(path, {"newer": "x" * 100})
    assert json.loads(path.read_text()) == {"older": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_failed_rename_leaves_the_older_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "metrics.json"
    files.write_json(path, {"older": 1})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"newer": 2})
    assert json.loads(path.read_text()) == {"older": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_json_of_something_else_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_json(path, {"older": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"newer": object()})
    assert json.loads(path.read_text()) == {"older": 1}


def test_file_that_is_not_whole_has_a_hidden_name_of_its_process(tmp_path: Path) -> None:
    # which no *.ckpt finds, and which no other process writes to
    with files.whole_file(tmp_path / "last.ckpt") as file:
        assert [path.name for path in tmp_path.iterdir()] == [f".last.ckpt.{os.getpid()}.part"]
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with files.whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": float("-inf")}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None},
    }
