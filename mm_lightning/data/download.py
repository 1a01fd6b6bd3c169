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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
        OSError: If it cannot be written into the folder.
        ValueError: If what came has another digest; nothing of it is kept.
    """
    path = folder / file.name
    if path.exists():
        return path
    print(f"Download     {file.url} to {folder}  ({file.size / 1e6:.0f} MB)", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_process(folder / f".{file.name}.lock"):
            if not path.exists():  # now
                _complete_and_verify(file, path)
    except OSError as error:
        if error.errno is None:  # a refusal of this module
            raise
        needs = f"That takes a folder that can be written and has {file.size / 1e6:.0f} MB free"
        text = f"{file.name} cannot be put into {folder} ({os.strerror(error.errno)}). {needs}: data.root=FOLDER."
        raise OSError(text) from error
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


def _complete_and_verify(file: RemoteFile, path: Path) -> None:
    part = path.with_name(f"{file.name}.part")
    is_begun = part.exists()
    _complete(file, part)
    found = _sha256(part)
    if found != file.sha256 and is_begun:  # of something else: once more, from the beginning
        part.unlink()
        _complete(file, part)
        found = _sha256(part)
    if found != file.sha256:
        part.unlink()
        text = f"{file.url} is not the official file: expected SHA-256 {file.sha256}, got {found}"
        raise ValueError(f"{text}. Nothing of it is kept; put the official {file.name} into {path.parent}.")
    os.replace(part, path)


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
        except _BrokeOff as error:
            reason = f" ({error})"
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
        _check_answer(file, answer, have, part)
        with part.open("ab" if have else "wb") as out:
            left = file.size - have + 1  # a byte too many tells that it is another file
            while left and (chunk := _read(answer, min(left, _CHUNK))):
                out.write(chunk)
                left -= len(chunk)
    if not left:
        part.unlink()
        raise _another(file, f"more than {file.size:,}")


class _BrokeOff(Exception):
    """A connection ended before its file did."""


def _answer(request: urllib.request.Request, part: Path) -> Any:
    url = request.full_url
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # it has no such range: then from the beginning
            part.unlink(missing_ok=True)
            raise _BrokeOff(f"HTTP {error.code}") from error
        text = f"{url} cannot be downloaded: HTTP {error.code} {error.reason}".rstrip()
        if error.code == 429 or error.code >= 500:
            raise ConnectionError(f"{text}. Run the same again later, or {_by_hand(part)}.") from error
        raise ConnectionError(f"{text}. To go on, {_by_hand(part)}.") from error
    except urllib.error.URLError as error:
        text = f"{url} cannot be downloaded: {error.reason}"
        raise ConnectionError(f"{text}. Connect, and run the same again, or {_by_hand(part)}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokeOff(type(error).__name__) from error


def _read(answer: Any, size: int) -> bytes:
    try:
        return answer.read(size)
    except (OSError, http.client.HTTPException) as error:  # TLS and the system have many names for it
        raise _BrokeOff(type(error).__name__) from error


def _check_answer(file: RemoteFile, answer: Any, have: int, part: Path) -> None:
    """Refuse an answer that says of itself that it is not what is missing of the file."""
    if answer.headers.get_content_type() == "text/html":
        text = f"{file.url} answers with a web page, as a proxy or a login does"
        raise ConnectionError(f"{text}. See what {answer.url} shows in a browser, or {_by_hand(part)}.")
    came = answer.headers.get("Content-Range", "")
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", came)
    if have and (span is None or int(span[1]) != have):
        part.unlink()  # then from the beginning
        raise _BrokeOff(f"asked for the bytes from {have} on, it came with {came!r}")
    if have and span is not None and span[2] not in ("*", str(file.size)):
        raise _another(file, f"{int(span[2]):,}")
    if answer.length is not None and answer.length != file.size - have:
        raise _another(file, f"{answer.length + have:,}")


def _another(file: RemoteFile, size: str) -> ConnectionError:
    text = f"{file.url} has another size than the official file: expected {file.size:,} bytes, got {size}"
    return ConnectionError(f"{text}. Nothing of it is used; get {file.name} elsewhere.")


def _by_hand(part: Path) -> str:
    return f"put {part.stem} into {part.parent} by hand"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Wait for other processes that have the lock, where the system and the disk know locks. Nothing is left behind.

    It is a file, not the folder: network disks lock only what can be written.
    """
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
        with suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # who had it has removed it
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
