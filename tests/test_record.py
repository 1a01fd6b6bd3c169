import errno
import json
import os
import resource
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from mm_lightning import record


@contextmanager
def no_space() -> Iterator[None]:
    """Let no file grow beyond 64 bytes, as a full disk would. Not for a whole test: its report may go to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_json_is_read_back(tmp_path: Path) -> None:
    content = {"seed": 3, "metrics": {"test/acc": 0.1 + 0.2}, "git_revision": None, "name": "Größe"}
    record.write_json(tmp_path / "metrics.json", content)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == content
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_json_is_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        record.write_json(tmp_path / "metrics.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "metrics.json").stat().st_mode) == 0o644


def test_full_disk_leaves_the_older_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    record.write_json(path, {"older": 1})
    with no_space(), pytest.raises(OSError, match="File too large"):
        record.write_json(path, {"newer": "x" * 100})
    assert json.loads(path.read_text()) == {"older": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_failed_rename_leaves_the_older_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "metrics.json"
    record.write_json(path, {"older": 1})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        record.write_json(path, {"newer": 2})
    assert json.loads(path.read_text()) == {"older": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_json_of_something_else_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    record.write_json(path, {"older": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        record.write_json(path, {"newer": object()})
    assert json.loads(path.read_text()) == {"older": 1}


def test_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with record.whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"


def test_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    record.claim_folder(folder, "seed: 0\n")
    with pytest.raises(FileExistsError, match=r"holds a run already\. Choose another folder with hydra\.run\.dir="):
        record.claim_folder(folder, "seed: 1\n")
    assert (folder / "config.yaml").read_text() == "seed: 0\n"


def test_folder_with_other_files_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "train.log").touch()  # what Hydra leaves before the run begins
    record.claim_folder(tmp_path, "seed: 0\n")
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"


def test_environment_names_versions() -> None:
    environment = record.environment()
    expected = {name: version(name) for name in ("torch", "lightning", "hydra-core", "torchmetrics", "mm-lightning")}
    assert {name: environment["packages"][name] for name in expected} == expected
    assert environment["processors"] == os.cpu_count()


def test_package_without_metadata_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_PACKAGES", ("no-such-package",))
    assert record.environment()["packages"] == {"no-such-package": "not installed"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, holding a package; the revision is that of the package's folder."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "record.py").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "package" / "record.py"))
    return tmp_path


def test_git_revision_is_the_commit_and_says_when_files_differ(checkout: Path) -> None:
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert record.environment()["git_revision"] == commit.stdout.strip()
    (checkout / "package" / "record.py").write_text("two")
    assert record.environment()["git_revision"] == f"{commit.stdout.strip()}-dirty"


def test_no_git_revision_outside_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an environment below somebody's repository is not that repository
    installed = checkout / "venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    monkeypatch.setattr(record, "__file__", str(installed / "record.py"))
    assert record.environment()["git_revision"] is None


def test_no_git_revision_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert record.environment()["git_revision"] is None


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    record.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": float("-inf")}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None},
    }


def test_full_disk_leaves_the_folder_unclaimed(tmp_path: Path) -> None:
    with no_space(), pytest.raises(OSError, match="File too large"):
        record.claim_folder(tmp_path / "run", "x: " + "y" * 100)
    record.claim_folder(tmp_path / "run", "x: 1")
    assert (tmp_path / "run" / "config.yaml").read_text() == "x: 1"
