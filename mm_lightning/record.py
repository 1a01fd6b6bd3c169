"""What a run leaves behind: its configuration, its final metrics, and what made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["claim_folder", "environment", "write_json", "write_text"]

_PACKAGES = ("mm-lightning", "torch", "lightning", "torchmetrics", "hydra-core", "tensorboard", "matplotlib", "numpy")


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
    try:
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            file.write(config)
    except FileExistsError:
        raise FileExistsError(f"{folder} holds a run already. Choose another folder with hydra.run.dir=...") from None


def environment() -> dict[str, Any]:
    """Return Python, platform, package versions and the source's git revision (None outside a git checkout)."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a clone that is not installed
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
        "git_revision": _git_revision(Path(__file__).parent),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all.

    Raises:
        OSError: If the folder cannot be written or is full. ``path`` is as it was before.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _git_revision(folder: Path) -> str | None:
    # Only a checkout of this package counts, not one that happens to surround an installed copy.
    if not (folder.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
