from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from mm_lightning.command.said import keep_what_is_said


def test_log_holds_both_streams_and_lightnings_own_and_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", False)
    handlers = list(logger.handlers)
    path = tmp_path / "train.log"
    path.write_text("before\n")
    with keep_what_is_said(path):
        print("a line")
        print("a warning", file=sys.stderr)
        for share in ("0 %", "50 %"):
            print(f"\rEpoch 0: {share}", end="")
        print()
        print("\x1b[1Ma bold bar")
        logger.warning("of %s", "Lightning")
        sys.stdout.writelines(["two\n", "three\n"])
        assert sys.stdout.isatty() is False
    print("after")
    assert path.read_text() == "before\na line\na warning\nof Lightning\ntwo\nthree\n"
    out, err = capsys.readouterr()
    assert out == "a line\n\rEpoch 0: 0 %\rEpoch 0: 50 %\n\x1b[1Ma bold bar\ntwo\nthree\nafter\n"
    assert err.startswith("a warning\n")
    assert logger.handlers == handlers


def test_log_ends_with_the_error(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    with pytest.raises(ValueError, match=r"^no\.$"), keep_what_is_said(path):
        _fail()
    assert path.read_text() == "a line\nerror: no.\n"
    assert not hasattr(sys.stdout, "_log")


def _fail() -> None:
    print("a line")
    raise ValueError("no.")
