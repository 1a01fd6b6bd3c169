"""The folder of a run: whose it is, and what made the run."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mm_lightning

__all__ = ["claim_folder", "environment", "package_versions"]

_PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "tensorboard", "matplotlib", "numpy")


def claim_folder(folder: Path, config: str) -> None:
    """Make a run's folder and put its resolved configuration in it.

    Args:
        folder: The run's folder.
        config: Resolved configuration, YAML.

    Raises:
        FileExistsError: If another run is in the folder already.
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    try:
        with path.open("x", encoding="utf-8") as claim:
            try:
                claim.write(config)
                claim.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise FileExistsError(f"{folder} holds a run already. Choose another folder with hydra.run.dir=...") from None


def environment() -> dict[str, Any]:
    """Return Python, platform, package versions and the source's git revision (None outside a git checkout)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": package_versions(),
        "git_revision": _git_revision(Path(__file__).parents[1]),
    }


def package_versions() -> dict[str, str]:
    """Return the version of this package, and of those that its numbers depend on."""
    versions = {"mm-lightning": mm_lightning.__version__}  # of this source: a clone need not be installed
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_revision(folder: Path) -> str | None:
    # Only a checkout of this package counts, not one that happens to surround an installed copy.
    if not (folder.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
