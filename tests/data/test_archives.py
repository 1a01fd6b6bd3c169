"""Archives that are read in place, and those that are refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from mm_lightning.data.archives import open_zip, read_tar

NOISE = bytes((i * i * 31 + i // 7) % 256 for i in range(20_000))


def tar(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in others:
            archive.addfile(info)
    return path


def folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_wanted_files_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", {"a/b": b"1", "a/c": NOISE, "d": b""}, folder("a"))
    assert read_tar(path, ["a/c", "d"]) == {"a/c": NOISE, "d": b""}
    assert [one.name for one in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..", "C:/x", "a\\..\\..\\x"])
def test_members_that_lie_outside_are_refused(tmp_path: Path, name: str) -> None:
    text = r"holds '.*', which lies outside its own folder\. Get the official one\."
    with pytest.raises(ValueError, match=text):
        read_tar(tar(tmp_path / "a.tar.gz", {"a/b": b"1", name: b"2"}), ["a/b"])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"2")
    with pytest.raises(ValueError, match=text), open_zip(tmp_path / "a.zip"):
        pass


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE], ids=["symbolic", "hard", "device"]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar(tmp_path / "a.tar.gz", {"b": b"1"}, link("a", kind))
    with pytest.raises(ValueError, match="'a', which is a link or a device"):
        read_tar(path, ["b"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar\.gz holds no 'c'\."):
        read_tar(tar(tmp_path / "a.tar.gz", {"b": b"1"}), ["b", "c"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_archives_are_refused(tmp_path: Path, share: float) -> None:
    path = tar(tmp_path / "a.tar.gz", {"b": NOISE, "c": NOISE[::-1]})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"a\.tar\.gz is damaged or ends too early \(.*\)\. Remove it, and get it"):
        read_tar(path, ["b", "c"])
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b", NOISE)
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: int(share * len(whole))])
    with (
        pytest.raises(ValueError, match=r"a\.zip is damaged or ends too early"),
        open_zip(tmp_path / "a.zip") as opened,
    ):
        opened.read("b")


def test_damage_within_is_refused_where_it_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b", NOISE)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[5_000] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip is damaged .*CRC"), open_zip(tmp_path / "a.zip") as opened:
        opened.read("b")


def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.tar\.gz"):
        read_tar(tmp_path / "no.tar.gz", ["b"])
