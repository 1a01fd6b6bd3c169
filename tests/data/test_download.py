"""Downloads from a server that breaks off, lies, or has something else: whole and verified, or not at all."""

from __future__ import annotations

import errno
import hashlib
import http.client
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from full_disk import no_space

from mm_lightning.data import download as module
from mm_lightning.data.download import RemoteFile, download, verify

CONTENT = bytes(range(256)) * 16  # 4,096 bytes
HALF = len(CONTENT) // 2


@dataclass
class Server:
    """Answers with ``CONTENT`` in the ways that are in ``answers``, one after the other; with the last from then on."""

    url: str = ""
    answers: list[Callable[[BaseHTTPRequestHandler, int | None], None]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)  # that were asked for

    def file(self, content: bytes = CONTENT, size: int | None = None) -> RemoteFile:
        size = len(content) if size is None else size
        return RemoteFile(f"{self.url}/data.bin", size, hashlib.sha256(content).hexdigest())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    ours = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            ours.ranges.append(asked)
            begin = None if asked is None else int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            answer = ours.answers[min(len(ours.ranges), len(ours.answers)) - 1]
            answer(self, begin)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    ours.url = f"http://127.0.0.1:{http.server_port}"
    yield ours
    http.shutdown()
    http.server_close()
    thread.join()


def send(
    status: int = 200, content: bytes = CONTENT, length: int | None = None, headers: dict[str, str] | None = None
) -> Callable[[BaseHTTPRequestHandler, int | None], None]:
    """An answer of its own length or of another, whatever range was asked for; -1 says none."""

    def answer(handler: BaseHTTPRequestHandler, begin: int | None) -> None:
        handler.send_response(status)
        if length != -1:
            handler.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def ranges(until: int = len(CONTENT), content: bytes = CONTENT) -> Callable[[BaseHTTPRequestHandler, int | None], None]:
    """A good server, which knows ranges; but it breaks off before the byte ``until``."""

    def answer(handler: BaseHTTPRequestHandler, begin: int | None) -> None:
        rest = content[begin or 0 :]
        span = {} if begin is None else {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        send(200 if begin is None else 206, content[begin or 0 : until], len(rest), span)(handler, begin)

    return answer


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [ranges()]
    path = download(server.file(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert download(server.file(), path.parent) == path
    assert (server.ranges, files(path.parent)) == ([None], ["data.bin"])
    assert capsys.readouterr().out == f"Download     {server.url}/data.bin to {path.parent}  (0 MB)\n"


def test_one_that_breaks_off_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.answers = [ranges(1000), ranges(1000), ranges(3000), ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=3000-"]
    assert files(tmp_path) == ["data.bin"]


def test_one_that_breaks_off_time_and_again_is_gone_on_with_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.answers = [ranges(HALF)]
    text = r"data\.bin broke off 3 times: 2,048 of 4,096 bytes are there\. The same command goes on\."
    with pytest.raises(ConnectionError, match=text):
        download(server.file(), tmp_path)
    assert files(tmp_path) == ["data.bin.part"]
    assert len(server.ranges) == 4
    server.answers = [ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges[4:] == ["bytes=2048-"]


def test_a_server_that_ignores_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.answers = [send(content=CONTENT[:HALF], length=len(CONTENT)), send()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=2048-"]


def test_a_server_without_such_a_range_is_asked_for_the_whole(server: Server, tmp_path: Path) -> None:
    server.answers = [ranges(HALF), send(416, b""), send()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=2048-", None]


def test_a_server_that_says_no_length_is_believed_by_what_comes(server: Server, tmp_path: Path) -> None:
    server.answers = [send(content=CONTENT[:HALF], length=-1), send(length=-1)]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT) - 1, len(CONTENT) + 1], ids=["shorter", "longer"])
def test_another_length_is_refused_before_anything_comes(server: Server, tmp_path: Path, length: int) -> None:
    server.answers = [send(content=(CONTENT * 2)[:length])]
    text = rf"another size than the official file: expected 4,096 bytes, got {length:,}\. Nothing of it is used"
    with pytest.raises(ConnectionError, match=text):
        download(server.file(), tmp_path)
    assert files(tmp_path) == []
    server.answers = [send()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


def test_more_than_was_said_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [send(content=CONTENT * 3, length=-1)]
    with pytest.raises(ConnectionError, match=r"expected 4,096 bytes, got more than 4,096\."):
        download(server.file(), tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "span", [{}, {"Content-Range": "bytes 0-2047/4096"}, {"Content-Range": "x"}], ids=["none", "another", "no"]
)
def test_another_part_than_was_asked_for_begins_anew(server: Server, tmp_path: Path, span: dict[str, str]) -> None:
    server.answers = [ranges(HALF), send(206, CONTENT[:HALF], headers=span), ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=2048-", None]


def test_a_part_of_a_larger_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [ranges(HALF), send(206, CONTENT[HALF:], headers={"Content-Range": "bytes 2048-4095/9000"})]
    with pytest.raises(
        ConnectionError, match=r"another size than the official file: expected 4,096 bytes, got 9,000\."
    ):
        download(server.file(), tmp_path)
    assert files(tmp_path) == ["data.bin.part"]


@pytest.mark.parametrize("status", [200, 206])
def test_a_web_page_is_not_taken_for_the_file(server: Server, tmp_path: Path, status: int) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:HALF])
    page = {"Content-Type": "text/html; charset=utf-8"}
    server.answers = [send(status, b"<html>Log in</html>", length=-1, headers=page)]
    text = (
        r"data\.bin answers with a web page, as a proxy or a login does\. See what http.*data\.bin shows in a browser, "
    )
    with pytest.raises(ConnectionError, match=text):
        download(server.file(), tmp_path)
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:HALF]
    server.answers = [ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


def test_a_length_that_is_no_number_is_none(server: Server, tmp_path: Path) -> None:
    server.answers = [send(headers={"Content-Length": "many"}, length=-1)]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("first", [ranges(content=CONTENT[::-1]), ranges(HALF, CONTENT[::-1])], ids=["all", "a part"])
def test_wrong_bytes_are_refused_and_not_kept(server: Server, tmp_path: Path, first: Any) -> None:
    server.answers = [first, ranges()]
    expected = f"expected SHA-256 {server.file().sha256}, got "
    with pytest.raises(ValueError, match=rf"{expected}\w{{64}}\. Nothing of it is kept"):
        download(server.file(), tmp_path)
    assert files(tmp_path) == []
    server.answers = [ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_of_something_else(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"x")
    server.answers = [ranges(HALF), ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=2048-"]


def test_a_part_that_is_complete_is_verified_and_not_asked_for(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


def test_a_missing_file_is_said_to_be_missing(server: Server, tmp_path: Path) -> None:
    server.answers = [send(404, b"")]
    text = rf"{server.url}/data\.bin cannot be downloaded: HTTP 404 Not Found\. To go on, put data\.bin into {tmp_path}"
    with pytest.raises(ConnectionError, match=text):
        download(server.file(), tmp_path)
    assert (len(server.ranges), files(tmp_path)) == (1, [])
    server.answers = [send()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_cannot_now_is_to_be_asked_later(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [ranges(HALF), send(status, b"")]
    with pytest.raises(
        ConnectionError, match=rf": HTTP {status} .*\. Run the same again later, or put data\.bin into "
    ):
        download(server.file(), tmp_path)
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:HALF]


def test_a_server_that_sends_elsewhere_is_followed(server: Server, tmp_path: Path) -> None:
    server.answers = [send(302, b"", headers={"Location": "/mirror/data.bin"}), ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "error", [ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), OSError(errno.EHOSTUNREACH, "No route")]
)
@pytest.mark.parametrize("place", ["begin", "read"])
def test_whatever_breaks_a_connection_is_gone_on_with(
    server: Server, tmp_path: Path, place: str, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = iter([error, None])
    method = getattr(http.client.HTTPResponse, place)

    def breaks(self: Any, *arguments: Any) -> Any:
        answer = method(self, *arguments)  # first: the server has then seen what is asked for
        if (now := next(broken, None)) is not None:
            raise now
        return answer

    monkeypatch.setattr(http.client.HTTPResponse, place, breaks)
    server.answers = [ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_no_server_is_said_in_one_sentence(tmp_path: Path) -> None:
    file = RemoteFile("http://127.0.0.1:9/data.bin", 1, "")  # the discard port
    with pytest.raises(
        ConnectionError, match=r"cannot be downloaded: .*refused\. Connect, and run .*, or put data\.bin"
    ):
        download(file, tmp_path)


def test_a_part_of_something_else_is_begun_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * HALF)
    server.answers = [ranges()]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=2048-", None]
    assert files(tmp_path) == ["data.bin"]


def test_a_full_disk_is_said_in_one_sentence(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = [ranges()]
    text = (
        rf"data\.bin cannot be put into {tmp_path} \(File too large\)\. That takes a folder that can be written and has"
    )
    with pytest.raises(OSError, match=text) as refused, no_space():
        download(server.file(), tmp_path)
    assert refused.value.errno is None  # or the command would tell to choose another folder for the run
    assert files(tmp_path) == ["data.bin.part"]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file", "File exists"), ("file/below", "Not a directory"), ("folder", "Read-only file system")],
)
def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(
    server: Server, tmp_path: Path, place: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "file").write_bytes(b"")
    if place == "folder":
        monkeypatch.setattr(module.os, "open", refused)
    with pytest.raises(
        OSError, match=rf"data\.bin cannot be put into {tmp_path / place} \({reason}\)\..*data\.root=FOLDER"
    ):
        download(server.file(), tmp_path / place)
    assert server.ranges == []


def test_ctrl_c_leaves_the_part_to_go_on_with(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupted)
    server.answers = [ranges(HALF), ranges(HALF), ranges()]
    with pytest.raises(KeyboardInterrupt):
        download(server.file(), tmp_path)
    assert files(tmp_path) == ["data.bin.part"]
    assert download(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.ranges[2:] == ["bytes=2048-"]


def test_of_several_at_once_one_downloads(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    server.answers = [ranges(1000), ranges()]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(download(server.file(), tmp_path).read_bytes())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 3
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], "expected bytes 4096, got 4095"),
        (CONTENT[::-1], rf"expected SHA-256 {hashlib.sha256(CONTENT).hexdigest()}, got \w{{64}}"),
    ],
    ids=["size", "digest"],
)
def test_a_file_on_disk_is_compared(tmp_path: Path, content: bytes, message: str) -> None:
    path, file = tmp_path / "data.bin", Server(url="http://nowhere").file()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.bin is not the official file: {message}\. Remove it, and put"):
        verify(file, path)
    path.write_bytes(CONTENT)
    verify(file, path)
