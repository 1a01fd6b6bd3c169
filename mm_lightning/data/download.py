"""Files of the web that are there whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RemoteFile", "download", "verify"]

PAUSE = 2.0  # seconds before a download that broke off is asked for again
_TIMEOUT = 60.0  # seconds without a byte
_IDLE_ATTEMPTS = 3  # that bring nothing new, one after the other
_CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class RemoteFile:
    """A file that is known beforehand.

    Attributes:
        url: Where it is.
        size: Bytes.
        sha256: Of its content, in hexadecimal digits.
    """

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """What it is called there, and here."""
        return self.url.rsplit("/", 1)[1]


def download(file: RemoteFile, folder: Path) -> Path:
    """Put the file into the folder, unless it is there.

    It comes as ``NAME.part`` and gets its name when size and digest are right. What is there of it is gone on with,
    when the connection breaks off and when the same is called again. Of several processes one at a time downloads.

    Returns:
        Its path.

    Raises:
        ConnectionError: If the server does not have it, has another one, or breaks off time and again.
        ValueError: If what came has another digest; nothing of it is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file.name
    with _one_process(folder):
        if not path.exists():
            print(f"Download     {file.url} to {folder}  ({file.size / 1e6:.0f} MB)", flush=True)
            part = path.with_name(f"{file.name}.part")
            _complete(file, part)
            if (found := _sha256(part)) != file.sha256:
                part.unlink()
                text = f"{file.url} is not the official file: expected SHA-256 {file.sha256}, got {found}"
                raise ValueError(f"{text}. Nothing of it is kept; put the official {file.name} into {folder}.")
            os.replace(part, path)
    return path


def verify(file: RemoteFile, path: Path) -> None:
    """Compare a file on disk with what is known of it.

    Raises:
        ValueError: If it has another size or digest.
    """
    size = path.stat().st_size
    expected, found = (file.size, size) if size != file.size else (file.sha256, _sha256(path))
    if expected != found:
        what = "bytes" if size != file.size else "SHA-256"
        text = f"{path} is not the official file: expected {what} {expected}, got {found}"
        raise ValueError(f"{text}. Remove it, and put the official one there or add data.download=true.")


def _complete(file: RemoteFile, part: Path) -> None:
    """Ask for what is missing of the part until it is as long as the file."""
    if _size(part) > file.size:  # of something else
        part.unlink()
    most, idle, reason = _size(part), 0, ""
    while _size(part) != file.size:
        if idle == _IDLE_ATTEMPTS:
            there = f"{_size(part):,} of {file.size:,} bytes are there"
            raise ConnectionError(f"{file.url} broke off {idle} times{reason}: {there}. The same command goes on.")
        if idle:
            time.sleep(PAUSE)
        try:
            _append(file, part)
        except (http.client.HTTPException, TimeoutError, ConnectionResetError) as error:
            reason = f" ({type(error).__name__})"
        idle = 0 if _size(part) > most else idle + 1
        most = max(most, _size(part))


def _append(file: RemoteFile, part: Path) -> None:
    """Ask once for the bytes from the part's end on, and append what comes: at most what is missing, and one more."""
    have = _size(part)
    headers = {"User-Agent": "mm-lightning", "Accept-Encoding": "identity"}
    request = urllib.request.Request(file.url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    with _answer(request, part) as answer:
        if answer.status != 206:  # all of it, asked for or not
            have = 0
        _check_length(file, answer, have)
        with part.open("ab" if have else "wb") as out:
            left = file.size - have + 1  # a byte too many tells that it is another file
            while left and (chunk := answer.read(min(left, _CHUNK))):
                out.write(chunk)
                left -= len(chunk)
    if not left:
        part.unlink()
        raise _another(file, f"more than {file.size:,}")


@contextmanager
def _answer(request: urllib.request.Request, part: Path) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # it has no such range: then from the beginning
            part.unlink(missing_ok=True)
            raise http.client.HTTPException(f"HTTP {error.code}") from error
        raise ConnectionError(
            f"{request.full_url} cannot be downloaded: HTTP {error.code} {error.reason}. {_by_hand(part)}"
        ) from error
    except urllib.error.URLError as error:
        raise ConnectionError(
            f"{request.full_url} cannot be downloaded: {error.reason}. Connect, and run the same again, or "
            f"{_by_hand(part)[0].lower()}{_by_hand(part)[1:]}"
        ) from error


def _check_length(file: RemoteFile, answer: Any, have: int) -> None:
    """Refuse an answer that says of itself that it is not what is missing of the file."""
    length = answer.headers.get("Content-Length")
    if length is not None and int(length) != file.size - have:
        raise _another(file, f"{int(length) + have:,}")
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if have and (span is None or int(span[1]) != have or span[2] not in ("*", str(file.size))):
        came = answer.headers.get("Content-Range")
        raise ConnectionError(f"{file.url} was asked for the bytes from {have} on, and answers with {came!r}.")


def _another(file: RemoteFile, size: str) -> ConnectionError:
    text = f"{file.url} has another size than the official file: expected {file.size:,} bytes, got {size}"
    return ConnectionError(f"{text}. Nothing of it is used; get {file.name} elsewhere.")


def _by_hand(part: Path) -> str:
    return f"Put {part.stem} into {part.parent} by hand."


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Wait for other processes that download into the folder, where the system and the disk know locks."""
    descriptor = None
    with suppress(ImportError, OSError):  # Windows; network disks
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
