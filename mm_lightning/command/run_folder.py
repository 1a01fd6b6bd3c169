"""The folder of a run: its name, whose it is, what made the run, and that nothing is left of one that was refused."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

import mm_lightning

__all__ = [
    "RefusedLeaveNothing",  # of conf/
    "claim_folder",
    "environment",
    "folder_name",
    "keep_composition",
    "keep_folder",
    "leave_nothing",
    "package_versions",
]

# What a run puts in its folder. In a folder that was there before, nothing else is taken away.
_LOG = "train.log"
_OF_A_RUN = (".hydra", "config.yaml", _LOG, "checkpoints", "figures", "tensorboard", "csv")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
_OF_A_SWEEP = "multirun.yaml"
_LONGEST = 200  # of a name; file systems take 255 bytes, and a number stands before it
_PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "tensorboard", "matplotlib", "numpy")


def folder_name(text: Any) -> str:
    """Return a name for one folder that tells the text: of 200 characters at most, ASCII, without slashes.

    Nor has it a sign that a shell or a later ``ckpt_path=...`` would have to quote. Of a longer name the beginning is
    left, and eight digits of its SHA-256 that tell it from others. In ``conf/`` it is ``${folder_name:...}``.
    """
    name = re.sub(r"[^\w.+-]+", "_", re.sub(r"[][{}()'\"~]", "", str(text)), flags=re.ASCII)
    if len(name) <= _LONGEST:
        return name
    digest = "_" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name[: _LONGEST - len(digest)] + digest


# Here, because Hydra imports this module, for its callback, before it makes a folder: in other applications, too.
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


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


def keep_composition(folder: Path) -> None:
    """Save what Hydra composed, as Hydra itself would in any run, before it knows whether the run is refused."""
    if HydraConfig.initialized() and not (folder / ".hydra").exists():
        hydra = HydraConfig.instance().cfg
        for name, content in {"hydra": hydra, "overrides": HydraConfig.get().overrides.task}.items():
            path = folder / ".hydra" / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(OmegaConf.to_yaml(content), encoding="utf-8")


class RefusedLeaveNothing(Callback):
    """Remembers what was there before Hydra made the folder of a run or of a sweep."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Look before Hydra makes the run's folder."""
        self._before = _Before.of(config.hydra.run.dir)
        _Before.known = self._before

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Look before Hydra makes the sweep's folder."""
        self._before = _Before.of(config.hydra.sweep.dir)
        _Before.known = self._before

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Look before the run puts anything in its folder, also in the process that a sweep has begun for it."""
        folder = Path(config.hydra.runtime.output_dir)
        log = folder / _LOG
        length = log.stat().st_size if log.is_file() else 0
        _Refusable.job = _Refusable(folder, frozenset(os.listdir(folder)), length, self._before)


def keep_folder() -> None:
    """Let the folder of the present job stay, whatever happens: it has begun to do what it is for."""
    _Refusable.job = None


def leave_nothing() -> None:
    """Take away what the present job put there, unless its folder is kept, and folders that Hydra made for nothing.

    What was there before stays, and so does what is not a run's own.
    """
    job, _Refusable.job = _Refusable.job, None
    is_first = all(os.environ.get(name, "0") == "0" for name in _RANKS)
    if job is not None and is_first:
        job.undo()
    if _Before.known is not None:
        _Before.known.remove_unused()


@dataclass(frozen=True)
class _Before:
    """The folder that Hydra is about to make, and which folders of its path, itself first, are missing."""

    base: Path
    missing: tuple[Path, ...]
    entries: frozenset[str]

    known: ClassVar[_Before | None] = None

    @staticmethod
    def of(folder: str) -> _Before:
        base = Path(os.path.abspath(folder))
        missing = tuple(path for path in (base, *base.parents) if not path.exists())
        with suppress(OSError):
            return _Before(base, missing, frozenset(os.listdir(base)))
        return _Before(base, missing, frozenset())

    def has_made(self, folder: Path) -> bool:
        """Whether a folder, the base or one in it, was not there."""
        inside = folder.relative_to(self.base).parts if folder.is_relative_to(self.base) else ()
        return self.base in self.missing or bool(inside and inside[0] not in self.entries)

    def remove_unused(self) -> None:
        """Remove the folders that were missing and are empty, or hold what a sweep writes first and nothing else."""
        with suppress(OSError):
            if self.base in self.missing and os.listdir(self.base) == [_OF_A_SWEEP]:
                (self.base / _OF_A_SWEEP).unlink()
        for folder in self.missing:
            with suppress(OSError):  # where there is something, or nothing any more
                folder.rmdir()


@dataclass(frozen=True)
class _Refusable:
    """A job that has not begun to train."""

    folder: Path
    entries: frozenset[str]
    length_of_log: int  # bytes
    before: _Before

    job: ClassVar[_Refusable | None] = None

    def undo(self) -> None:
        for name in self._own():
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if _LOG in self.entries:
            os.truncate(self.folder / _LOG, self.length_of_log)
        if self.before.has_made(self.folder):
            with suppress(OSError):
                self.folder.rmdir()

    def _own(self) -> Iterator[str]:
        return (name for name in _OF_A_RUN if name not in self.entries)


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
