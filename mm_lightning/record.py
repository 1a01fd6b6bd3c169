"""What a run leaves behind: its configuration, its final metrics, and what made them."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["claim_folder", "environment", "whole_file", "write_json"]

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
    """Write ``content`` to ``path``, whole or not at all (see :func:`whole_file`); NaN and infinity become null."""
    with whole_file(path) as file:
        file.write((json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place at ``path`` when the block has ended without an exception.

    Raises:
        OSError: If the folder cannot be written or is full. ``path`` is as it was before.
    """
    # In the same folder: from another file system the rename would be a copy, which can be cut short.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here at the latest, before an older file is replaced
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _git_revision(folder: Path) -> str | None:
    # Only a checkout of this package counts, not one that happens to surround an installed copy.
    if not (folder.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
