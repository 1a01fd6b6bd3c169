"""What a forked run seems to be to those that ask how it was begun."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from mm_lightning.command import preloaded


def test_a_fork_seems_typed_as_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    of_parent = ModuleType("__main__")
    of_parent.__spec__ = ModuleSpec("mm_lightning.command.preloaded", None)
    monkeypatch.setitem(sys.modules, "__main__", of_parent)
    monkeypatch.setattr(sys, "argv", ["preloaded"])
    preloaded._seem_typed(["seed=1"])
    # Lightning begins the processes of other devices as ``python -m`` of this name, with these words
    assert of_parent.__spec__.name == "mm_lightning.train"
    assert sys.argv[1:] == ["seed=1"]
