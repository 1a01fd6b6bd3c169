"""docs/performance.md: what was measured, how, against which target, and the command that measures it again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import BENCHMARKS
from bench.markdown import cells, flat_tables, number_lines
from bench.plots import Picture, draw
from bench.timing import is_met, table
from mm_lightning.files import whole_file

__all__ = ["commentary", "load", "write"]

COMMENTARY = Path(__file__).with_name("commentary.md")
OPENING = """# How fast it is

Written by `python scripts/benchmark.py report` from the numbers in [{folder}]({folder}), which the commands below made.

A machine's speed drifts by more than most of what is measured here, so no time stands alone. All sides of a comparison
run in turn, once in each round and in an order that changes: in one process, or, where whole commands are compared, one
process after another. A ratio is that of two sides in the same round; given are its median over the rounds and, behind
it, its quartiles. In the tables, `median` is a side's median time and `times` its ratio to the side that has 1 there. A
target is met if the median ratio meets it, whatever the quartiles. Times, and in part the ratios, are of this machine:
"""


def write(results: Path, docs: Path) -> None:
    """Write ``performance.md`` and its pictures, ``performance_*.png``, from the numbers of the benchmarks.

    Hand-written passages come from ``commentary.md`` beside this file. A benchmark without numbers is named at the end.

    Args:
        results: Folder of the files that ``scripts/benchmark.py`` wrote, ``NAME.json``.
        docs: Folder to write to.

    Raises:
        FileNotFoundError: If there are no numbers at all.
        ValueError: If a file holds something else, or a passage is about no benchmark.
    """
    found = load(results)
    passages = commentary(COMMENTARY.read_text(encoding="utf-8"))
    folder = Path(os.path.relpath(results, docs)).as_posix()
    pictures = draw(found, docs)
    parts = [
        OPENING.format(folder=folder) + "\n" + _machine(found),
        "## Summary\n\n" + _targets(found),
        passages.get("summary", ""),
        *(_section(result, passages.get(name, ""), pictures.get(name, []), folder) for name, result in found.items()),
        _missing(found),
    ]
    docs.mkdir(parents=True, exist_ok=True)
    with whole_file(docs / "performance.md") as file:
        file.write(("\n\n".join(part for part in parts if part) + "\n").encode())


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Read the numbers of each benchmark that has some, in the order of ``BENCHMARKS``."""
    found = {}
    for name in BENCHMARKS:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        if "rows" not in found[name]:
            again = f"python scripts/benchmark.py {name} --json {path}"
            raise ValueError(f"{path} has no 'rows', so another program wrote it. Measure again: {again}")
    if not found:
        raise FileNotFoundError(f"{results} holds no numbers. Measure first: python scripts/benchmark.py all")
    return found


def commentary(text: str) -> dict[str, str]:
    """Split Markdown at its ``## NAME`` headings; what stands before the first is left out.

    Raises:
        ValueError: If a name is neither a benchmark's nor ``summary``.
    """
    _, *found = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    passages = {name.strip(): passage.strip() for name, passage in zip(found[::2], found[1::2], strict=True)}
    if unknown := passages.keys() - {"summary", *BENCHMARKS}:
        raise ValueError(f"The commentary is about {sorted(unknown)}, expected 'summary' or one of {list(BENCHMARKS)}.")
    return passages


def _machine(found: Mapping[str, dict[str, Any]]) -> str:
    versions = {name: ", ".join(f"{key} {value}" for key, value in _versions(one)) for name, one in found.items()}
    facts = {
        "Processor": {name: one["processor"] for name, one in found.items()},
        "Cores and threads": {name: f"{one['processors']} and {one['threads']}" for name, one in found.items()},
        "System": {name: one["platform"] for name, one in found.items()},
        "Versions": versions,
        "Git revision": {name: _revision(one["git_revision"]) for name, one in found.items()},
    }
    return "\n".join(f"- {fact}: {_by_value(values)}" for fact, values in facts.items())


def _versions(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("Python", result["python"]), *result["packages"].items()]


def _revision(revision: str | None) -> str:
    if revision is None:
        return "unknown"
    changed = revision.endswith("-dirty")
    return f"`{revision.removesuffix('-dirty')[:10]}`{' with changes not committed' * changed}"


def _by_value(values: Mapping[str, str]) -> str:
    """One text if all benchmarks share it, else each text with the benchmarks that it holds for."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{value} ({', '.join(those)})" for value, those in names.items())


def _targets(found: Mapping[str, dict[str, Any]]) -> str:
    lines, met = [], 0
    for name, result in found.items():
        for row in result["rows"]:
            for side, target in row["targets"].items():
                limit = f"{'at most' if target > 0 else 'at least'} {abs(target):g} times {row['against']}"
                is_one_met = bool(is_met(row, side))
                met += is_one_met
                measured = f"{_ratio(row['ratios'][side])}, {'met' if is_one_met else '**missed**'}"
                what = f"[{name}](#{name}), {row['case']}: {side} {limit}"
                lines.append(cells(what, measured, f"`{result['command']}`"))
    if not lines:
        return "None of the benchmarks below has a target."
    return "\n".join(
        [
            f"{met} of {len(lines)} targets are met.",
            "",
            cells("target", "measured", "command"),
            cells("---", "---", "---"),
            *lines,
        ]
    )


def _ratio(found: Mapping[str, float]) -> str:
    digits = 3 if found["median"] < 2 else 2  # as in the tables of bench.timing
    lower, median, upper = (f"{found[key]:.{digits}f}" for key in ("lower_quartile", "median", "upper_quartile"))
    return f"{median} ({lower} to {upper})"


def _section(result: dict[str, Any], passage: str, pictures: list[Picture], folder: str) -> str:
    name, what = result["benchmark"], result["what"]
    head = f"## {name}\n\n{what[0].upper()}{what[1:]}: `{result['command']}`, [numbers]({folder}/{name}.json)."
    if "--quick" in result["command"].split():
        head += " **A quick run, too short to conclude anything from it.**"
    rows = table(result["rows"]) if result["rows"] else ""
    if rows and pictures:  # the picture says it at a glance
        rows = f"<details>\n<summary>Table</summary>\n\n{rows}\n\n</details>"
    images = [f"![{picture.alt}]({picture.file})" for picture in pictures]
    notes = "\n".join([*number_lines(result), *(f"- {note}" for note in result.get("notes", []))])
    parts = [head, passage, *images, rows, *flat_tables(result), notes]
    return "\n\n".join(part for part in parts if part)


def _missing(found: Mapping[str, Any]) -> str:
    missing = [name for name in BENCHMARKS if name not in found]
    if not missing:
        return ""
    lines = [f"- {name}, {BENCHMARKS[name]}: `python scripts/benchmark.py {name}`" for name in missing]
    return "## Not measured\n\n" + "\n".join(lines)
