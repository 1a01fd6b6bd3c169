"""Imports point one way, and every public name is there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import mm_lightning

PACKAGE = Path(mm_lightning.__file__).parent
# What each part may import of the package, from the bottom up. The entries of commands import the command alone.
ALLOWED = {
    "arguments": set(),
    "conf": set(),
    "devices": set(),
    "files": set(),
    "fast_cpu": set(),
    "losses": set(),
    "namespaces": set(),
    "summary": set(),
    "mixup": {"arguments", "devices", "mixup"},
    "models": {"arguments", "models", "module"},
    "data": {"arguments", "data", "devices", "namespaces"},
    "step": {"arguments", "mixup", "namespaces", "step"},
    "controls": {"arguments", "namespaces", "step"},
    "look": {"arguments", "look", "mixup", "namespaces", "step"},
    "fit": {"arguments", "look", "mixup", "namespaces", "step"},
    "draws": {"arguments", "mixup", "namespaces"},
    "callback": {"arguments", "draws", "fit", "mixup", "namespaces", "step", "summary"},
    "module": {"arguments", "mixup", "namespaces"},
    "evaluation": {"arguments", "evaluation"},
    "diagnostics": {"arguments", "callback", "diagnostics", "evaluation", "files", "mixup", "namespaces"},
    "study": {"diagnostics", "evaluation", "files", "study"},
    "command": {
        *("arguments", "callback", "command", "conf", "diagnostics", "evaluation", "fast_cpu", "files", "look"),
        *("namespaces", "study"),
    },
    "reproduce": {"command"},
    "train": {"command"},
    "compare": {"command"},
    "evaluate": {"command"},
    "inspect": {"command", "look"},
}


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, but for those it needs for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _files(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    for path in _files(part):
        parts = {name.split(".")[1] for name in _imports(path) if name.startswith("mm_lightning.")}
        allowed = {"command"} if path.name == "__main__.py" else ALLOWED[part]  # the entry of a command
        assert parts <= allowed, f"{path.name} imports {parts - allowed}"


def test_every_part_is_listed() -> None:
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - set(ALLOWED) == {"__init__"}


def _private_uses(source: str) -> list[str]:
    """What starts with an underscore and belongs to another module of the package, where a file uses it."""
    tree = ast.parse(source)
    ours, found = set(), []  # names bound to what comes from the package
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mm_lightning":
                    ours.add(alias.asname or "mm_lightning")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "mm_lightning"):
            ours.update(alias.asname or alias.name for alias in node.names)
            found += [f"{node.module}.{alias.name}" for alias in node.names if _is_private(alias.name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ours:
                found.append(ast.unparse(node))
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_stay_in_their_module(path: Path) -> None:
    assert _private_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("from mm_lightning.a import b, _c", ["mm_lightning.a._c"]),
        ("from mm_lightning.a import _c as c", ["mm_lightning.a._c"]),
        ("def f():\n    from .a import _c", ["a._c"]),
        ("from mm_lightning import a\na._c()", ["a._c"]),
        ("from mm_lightning import a as b\nb._c.d", ["b._c"]),
        ("import mm_lightning.a\nmm_lightning.a._c", ["mm_lightning.a._c"]),
        ("import mm_lightning.a as b\nb._c", ["b._c"]),
        ("import torch\nfrom mm_lightning.a import __all__\ntorch._c, self._d, __name__", []),
    ],
)
def test_private_uses_are_seen(source: str, used: list[str]) -> None:
    assert _private_uses(source) == used


@pytest.mark.parametrize("part", ["mixup", "evaluation"])
def test_the_core_is_plain_torch(part: str) -> None:
    roots = {name.split(".")[0] for path in _files(part) for name in _imports(path)}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_utilities", "hydra", "omegaconf", "matplotlib"}


@pytest.mark.parametrize("name", mm_lightning.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    assert getattr(mm_lightning, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mixup'"):
        mm_lightning.Mixup  # noqa: B018


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[1]).abs().mean()  # not linear in the targets: the partners' half runs

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Journey(pl.Callback):
    """The functions of the package that the fourth batch runs through, in the order of their first calls."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        def note(frame: Any, event: str, argument: Any) -> None:
            path = Path(frame.f_code.co_filename)
            if event == "call" and path.is_relative_to(PACKAGE):
                name = f"{path.relative_to(PACKAGE).as_posix()} {frame.f_code.co_name}"
                self.found += [] if name in self.found else [name]

        if batch_idx == 3:
            sys.setprofile(note)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        sys.setprofile(None)


def test_a_batch_passes_six_files_in_the_order_that_is_written_down(make_trainer: Callable[..., pl.Trainer]) -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"^  \d\. `([\w/.]+)`", text, flags=re.MULTILINE)
    torch.manual_seed(0)
    journey = _Journey()
    trainer = make_trainer(journey, mm_lightning.ManifoldMixupCallback(layers=["net.0", "net.1"]))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 2), torch.randn(16, 1)), 4)
    trainer.fit(Regression(), batches)
    functions = ["on_train_batch_start", "draw", "run", "__call__", "mix_rows", "_repeat"]
    places = [journey.found.index(f"{file} {name}") for file, name in zip(files, functions, strict=True)]
    assert places == sorted(places)
