from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from full_disk import no_space

from mm_lightning.command import run_folder


def test_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    run_folder.claim_folder(folder, "seed: 0\n")
    with pytest.raises(FileExistsError, match=r"holds a run already\. Choose another folder with hydra\.run\.dir="):
        run_folder.claim_folder(folder, "seed: 1\n")
    assert (folder / "config.yaml").read_text() == "seed: 0\n"


def test_folder_with_other_files_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "train.log").touch()  # what Hydra leaves before the run begins
    run_folder.claim_folder(tmp_path, "seed: 0\n")
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"


def test_environment_names_versions() -> None:
    environment = run_folder.environment()
    expected = {name: version(name) for name in ("torch", "lightning", "hydra-core", "torchmetrics", "mm-lightning")}
    assert {name: environment["packages"][name] for name in expected} == expected
    assert environment["processors"] == os.cpu_count()


def test_a_package_without_metadata_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_PACKAGES", ("no-such-package",))
    assert run_folder.environment()["packages"]["no-such-package"] == "not installed"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, holding a package; the revision is that of the package's folder."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "package" / "command" / "module.py"))
    return tmp_path


def test_git_revision_is_the_commit_and_says_when_files_differ(checkout: Path) -> None:
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert run_folder.environment()["git_revision"] == commit.stdout.strip()
    (checkout / "package" / "module.py").write_text("two")
    assert run_folder.environment()["git_revision"] == f"{commit.stdout.strip()}-dirty"


def test_no_git_revision_outside_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an environment below somebody's repository is not that repository
    installed = checkout / "venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    monkeypatch.setattr(run_folder, "__file__", str(installed / "command" / "module.py"))
    assert run_folder.environment()["git_revision"] is None


def test_no_git_revision_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_folder.environment()["git_revision"] is None


def test_full_disk_leaves_the_folder_unclaimed(tmp_path: Path) -> None:
    with no_space(), pytest.raises(OSError, match="File too large"):
        run_folder.claim_folder(tmp_path / "run", "x: " + "y" * 100)
    run_folder.claim_folder(tmp_path / "run", "x: 1")
    assert (tmp_path / "run" / "config.yaml").read_text() == "x: 1"
