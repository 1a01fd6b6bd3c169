"""Archives read in place: nothing is extracted to the disk."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

__all__ = ["open_zip", "read_tar"]

_CHUNK = 2**20  # bytes
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error)


def read_tar(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """Read files of a ``.tar.gz``.

    Args:
        path: The archive.
        wanted: Names of the files in it.

    Returns:
        Their contents by name.

    Raises:
        ValueError: If the archive is damaged, one is missing, or a member would lie outside the folder it is for.
    """
    found: dict[str, bytes] = {}
    with _naming(path), gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            _check_name(path, member.name)
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{path} holds {member.name!r}, which is a link or a device. Get the official one.")
            if member.name in wanted and (content := archive.extractfile(member)):
                found[member.name] = content.read()
        while stream.read(_CHUNK):  # to the end, where gzip has its checksum
            pass
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{path} holds no {missing[0]!r}. Get the official one.")
    return found


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a ``.zip``, to be read from within the block.

    Raises:
        ValueError: If it is damaged, also where the block finds it so, or a member would lie outside the folder it is
            for.
    """
    with _naming(path), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            _check_name(path, name)
        yield archive


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        text = f"{path} is damaged or ends too early ({type(error).__name__}: {error})"
        raise ValueError(f"{text}. Remove it, and get it again.") from error


def _check_name(path: Path, name: str) -> None:
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    if any(kind.anchor or ".." in kind.parts for kind in kinds):
        raise ValueError(f"{path} holds {name!r}, which lies outside its own folder. Get the official one.")
