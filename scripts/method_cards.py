"""Write the index of the method cards in docs/methods, and their pictures.

    python scripts/method_cards.py            # the table of docs/methods/README.md, and docs/methods/*.png
    python scripts/method_cards.py --check    # exit code 1, and what is stale, if a card, a picture or a row is

A way of mixing is a file of conf/mixup; its card is the page of that name, in one form. The table is read from both:
the callback's arguments from the file, the title from the card, the cost from benchmarks/methods.json, and which tests
name the classes of the way.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from tables import between_marks, markdown_table  # noqa: E402

__all__ = ["CARDS", "HEADINGS", "Way", "problems", "table", "ways"]

CARDS = ROOT / "docs" / "methods"
INDEX = CARDS / "README.md"
FORM = "What it does", "Picture", "Settings", "Cost", "When it helps, and when not", "Source"
HEADINGS = [*FORM, "What differs from the authors' code"]
MANIFOLD = "manifold"
OTHER_PAGES = ("README", "own", "study")
LARGEST = 60_000  # bytes of a picture


class Way:
    """A file of conf/mixup that mixes.

    Args:
        name: Of the file.

    Attributes:
        settings: What it sets otherwise than manifold mixup does, and that nothing else does.
        config: All settings of the callback, resolved.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = _composed(name)
        plain = _composed(MANIFOLD)
        self.settings = {key: value for key, value in self.config.items() if value != plain[key]}

    @property
    def card(self) -> Path:
        """Its page."""
        return CARDS / f"{self.name}.md"

    @property
    def title(self) -> str:
        """The first line of its card."""
        return self.card.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")

    @property
    def cost(self) -> str:
        """The ratio of a training step to one without mixup, on the networks that were timed and it fits."""
        rows = [row for row in _timed() if row["against"] == "none" and self.name in row["ratios"]]
        found = [f"{row['kind']} {row['ratios'][self.name]['median']:.2f}" for row in rows]
        return ", ".join(found) or "not measured"

    @property
    def written(self) -> str:
        """Its card, with the cost."""
        return between_marks(self.card.read_text(encoding="utf-8"), "cost", f"{self.cost}\n")

    @property
    def arguments(self) -> str:
        """The callback's arguments, as they are typed."""
        given = {key: _typed(value) for key, value in self.settings.items() if value is not None}
        given.setdefault("schedule", "None")  # where the callback's default ends mixing before training
        return ", ".join(f"{key}={value}" for key, value in given.items())

    @property
    def tests(self) -> Path:
        """Of the tests' files the first that names all classes of the way, else the one that trains each."""
        classes = re.findall(r"'_target_': '[\w.]*?(\w+)'", str(self.settings)) or ["ManifoldMixupCallback"]
        words = [*classes, *({"clean_weight"} & self.settings.keys())]
        folder = ROOT / "tests"
        for path in (folder / "mixup" / "test_ways.py", *sorted(folder.glob("mixup/test_*.py"))):
            if path.is_file() and all(re.search(rf"\b{word}\b", path.read_text(encoding="utf-8")) for word in words):
                return path
        return folder / ("test_callback.py" if words == ["ManifoldMixupCallback"] else "test_conf.py")


def ways() -> list[Way]:
    """All of them: manifold and input mixup, then by name."""
    names = sorted(path.stem for path in (ROOT / "conf" / "mixup").glob("*.yaml") if path.stem != "none")
    return [Way(name) for name in sorted(names, key=lambda name: (name != MANIFOLD, name != "input"))]


def table() -> str:
    """The index, in Markdown."""
    head = ["way", "`mixup=`", "arguments of the callback", "tests", "step over one without mixup"]
    lines = []
    for way in ways():
        tests = way.tests.relative_to(ROOT).as_posix()
        conf = f"[`{way.name}`](../../conf/mixup/{way.name}.yaml)"
        arguments = way.arguments if way.arguments == "the defaults" else f"`{way.arguments}`"
        lines.append([f"[{way.title}]({way.card.name})", conf, arguments, f"[{tests}](../../{tests})", way.cost])
    return markdown_table(head, lines)


def problems() -> list[str]:
    """What is stale or missing, a line each."""
    names = [way.name for way in ways()]
    found = []
    for suffix, expected in ((".md", {*names, *OTHER_PAGES}), (".png", {*names})):
        there = {path.stem for path in CARDS.glob(f"*{suffix}")}
        found += [f"docs/methods/{name}{suffix} is missing." for name in sorted(expected - there)]
        found += [f"docs/methods/{name}{suffix} is of no file in conf/mixup." for name in sorted(there - expected)]
    if found:
        return found
    for name in names:
        headings = re.findall(r"^## (.*)$", (CARDS / f"{name}.md").read_text(encoding="utf-8"), re.MULTILINE)
        if headings != HEADINGS:
            found.append(f"docs/methods/{name}.md has the headings {headings}, not {HEADINGS}.")
        if (size := (CARDS / f"{name}.png").stat().st_size) > LARGEST:
            found.append(f"docs/methods/{name}.png is of {size} bytes, more than {LARGEST}.")
        if Way(name).written != (CARDS / f"{name}.md").read_text(encoding="utf-8"):
            found.append(f"The cost in docs/methods/{name}.md is stale: python scripts/method_cards.py")
    page = INDEX.read_text(encoding="utf-8")
    if between_marks(page, "methods", table()) != page:
        found.append("The table of docs/methods/README.md is stale: python scripts/method_cards.py")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is stale")
    if not parser.parse_args().check:
        from method_pictures import draw  # what is only checked needs no matplotlib

        for way in ways():
            draw(way.config, way.settings, way.title, CARDS / f"{way.name}.png")
            way.card.write_text(way.written, encoding="utf-8")
        INDEX.write_text(between_marks(INDEX.read_text(encoding="utf-8"), "methods", table()), encoding="utf-8")
    for problem in (found := problems()):
        print(problem)
    return 1 if found else 0


@cache
def _timed() -> list[dict[str, Any]]:
    """The rows of ``python scripts/benchmark.py methods``."""
    path = ROOT / "benchmarks" / "methods.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


@cache
def _composed(name: str) -> dict[str, Any]:
    """The node ``mixup`` as Hydra would make it: the defaults of a file, then the file."""
    whole = OmegaConf.load(ROOT / "conf" / "train.yaml")
    node = OmegaConf.create({"alpha": whole.alpha, "seed": whole.seed, "mixup": _merged(name)})
    return OmegaConf.to_container(node, resolve=True)["mixup"]  # type: ignore[call-overload,index,return-value]


def _merged(name: str) -> Any:
    own = OmegaConf.load(ROOT / "conf" / "mixup" / f"{name}.yaml")
    defaults = own.pop("defaults", [])
    return OmegaConf.merge(*map(_merged, defaults), own)


def _typed(value: Any) -> str:
    if not (isinstance(value, dict) and "_target_" in value):
        return f'"{value}"' if isinstance(value, str) else repr(value)
    kind = get_object(value["_target_"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    given = {key: item for key, item in value.items() if key != "_target_" and item != defaults.get(key)}
    return f"{kind.__name__}({', '.join(f'{key}={_typed(item)}' for key, item in given.items())})"


if __name__ == "__main__":
    sys.exit(main())
