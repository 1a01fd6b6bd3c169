"""Imports point one way, and every public name is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mm_lightning

PACKAGE = Path(mm_lightning.__file__).parent
# What each part may import of the package. The command may import everything.
ALLOWED = {
    "mixup": {"mixup"},
    "models": {"models"},
    "data": {"data"},
    "step": {"mixup", "step"},
    "look": {"look", "mixup", "step"},
    "report": set(),
    "fit": {"look", "mixup", "step"},
    "callback": {"fit", "mixup", "report", "step"},
    "inspect": {"failure", "look", "mixup", "train"},
    "module": {"mixup"},
    "record": set(),
    "checkpoint": {"record"},
    "diagnostics": {"callback", "diagnostics", "mixup", "record"},
    "reproduce": {"diagnostics", "failure", "record", "reproduce", "train"},
    "compare": {"failure", "record", "reproduce", "train"},
    "failure": set(),
    "fast_cpu": set(),
    "interrupt": set(),
    "progress": set(),
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
        assert parts <= ALLOWED[part], f"{path.name} imports {parts - ALLOWED[part]}"


def test_every_part_is_listed() -> None:
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - set(ALLOWED) == {"__init__", "train"}


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


def test_the_core_is_plain_torch() -> None:
    roots = {name.split(".")[0] for path in _files("mixup") for name in _imports(path)}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_utilities", "hydra", "omegaconf", "matplotlib"}


@pytest.mark.parametrize("name", mm_lightning.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    assert getattr(mm_lightning, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mixup'"):
        mm_lightning.Mixup  # noqa: B018
