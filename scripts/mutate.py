"""Break lines of the package one at a time, and print which no test notices.

    python scripts/mutate.py                                     # 15 lines in each of FOLDERS
    python scripts/mutate.py --lines 5 --seed 1                  # others
    python scripts/mutate.py --only mm_lightning/mixup/plan.py:120
    python scripts/mutate.py --json mutations.json

It needs ``coverage``, which tells which tests run which line: the tests run once under it, in a copy of the repository;
``--coverage FILE`` remembers that. Each change is made in a copy, and the tests that run its line run until one fails.
What survives is a line that could be wrong without anybody's knowing, or a change that makes no difference;
scripts/mutations.json says of the latter why. Exit code 1 if something survives without an explanation.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

__all__ = ["Mutation", "mutations_of"]

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "scripts" / "mutations.json"
FOLDERS = ("mixup", "look", "step", "evaluation", "diagnostics", "command")
AT_ONCE = 2
NOTICED, SURVIVED, TOO_SLOW, UNTESTED = "noticed", "SURVIVED", "TOO SLOW", "NO TEST RUNS IT"
COMPARISONS = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"},
}
OPERATIONS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*"}

Covered = dict[str, dict[str, list[str]]]
"""For each file and each line the tests that run it."""


@dataclass(frozen=True)
class Mutation:
    """One change of one line.

    Attributes:
        path: Of the file, from the repository's root.
        line: Its number, from 1.
        before: The expression or statement.
        after: What takes its place.
        begin: Where it begins in the file, in bytes.
        text: The line.
    """

    path: str
    line: int
    before: str
    after: str
    begin: int
    text: str

    @property
    def name(self) -> str:
        """What it is called as long as the line stays as it is."""
        return f"{self.path}: {self.text}: {self.before} -> {self.after}"

    def applied(self, source: bytes) -> bytes:
        """The file with the change."""
        end = self.begin + len(self.before.encode())
        return source[: self.begin] + self.after.encode() + source[end:]


def mutations_of(path: str, source: str) -> list[Mutation]:
    """All changes that can be made to a file, of expressions that stand on one line."""
    content, starts = source.encode(), [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def begin(node: Any) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def text(node: Any) -> str:
        return content[begin(node) : starts[node.end_lineno - 1] + node.end_col_offset].decode()

    changes = _changes(ast.parse(source), text)
    one_line = [(node, after) for node, after in changes if node.lineno == node.end_lineno]
    lines = [line.strip() for line in source.splitlines()]
    return [Mutation(path, n.lineno, text(n), after, begin(n), lines[n.lineno - 1]) for n, after in one_line]


def _changes(tree: ast.Module, text: Callable[[Any], str]) -> Iterator[tuple[Any, str]]:
    for node in _executed(tree):
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]):
                yield node, f"{text(left)} {COMPARISONS[type(operator)]} {text(right)}"
            case ast.BoolOp(op=operator, values=values):
                word = " or " if isinstance(operator, ast.And) else " and "
                yield node, word.join(f"({text(value)})" for value in values)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, f"bool({text(operand)})"
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                yield node, f"(+{text(operand)})"
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATIONS:
                yield node, f"{text(left)} {OPERATIONS[type(operator)]} {text(right)}"
            case ast.Constant(value=bool() as value):
                yield node, str(not value)
            case ast.Constant(value=int() | float() as value):
                yield node, repr(value + 1)
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield node, "return None"
            case ast.Expr(value=ast.Call()):
                yield node, "pass"


def _executed(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that do something, rather than annotate, word an error, or draw: pictures are judged by eye."""
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop(0)
        yield node
        draws = isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith(("draw", "dress", "write_num"))
        if draws or isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
            continue
        for name, field in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                waiting += [
                    part for part in (field if isinstance(field, list) else [field]) if isinstance(part, ast.AST)
                ]


def sampled(lines: int, seed: int) -> list[Mutation]:
    """A change each of so many lines in each folder."""
    rng = np.random.default_rng(seed)
    found: list[Mutation] = []
    for folder in FOLDERS:
        by_line: dict[tuple[str, int], list[Mutation]] = {}
        for path in sorted((ROOT / "mm_lightning" / folder).glob("*.py")):
            for mutation in mutations_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")):
                by_line.setdefault((mutation.path, mutation.line), []).append(mutation)
        choices = list(by_line.values())
        for place in rng.permutation(len(choices))[:lines]:
            found.append(choices[place][rng.integers(len(choices[place]))])
    return found


def copied(folder: Path) -> Path:
    """Copy what git knows of, as it is now."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def coverage_of(folder: Path, tests: Sequence[str]) -> Covered:
    """Run the tests in a copy, and note which of them run which line."""
    settings = folder / "coverage.ini"
    settings.write_text(
        "[run]\ndynamic_context = test_function\nsource = mm_lightning\ndata_file = .coverage_of_tests\n"
    )
    python, rc = [sys.executable, "-m"], f"--rcfile={settings}"
    subprocess.run([*python, "coverage", "run", rc, "-m", "pytest", "-q", *tests], cwd=folder, env=_environment(folder))
    command = [*python, "coverage", "json", "-q", rc, "--show-contexts", "-o", "lines.json"]
    subprocess.run(command, cwd=folder, env=_environment(folder), check=True)
    files = json.loads((folder / "lines.json").read_text())["files"]
    return {
        path: {
            line: sorted({_test_of(folder, context) for context in contexts if context})
            for line, contexts in about["contexts"].items()
        }
        for path, about in files.items()
    }


def _test_of(folder: Path, context: str) -> str:
    """``tests.mixup.test_plan.test_a``, or without the folders, as pytest names it."""
    module, _, function = context.rpartition(".")
    name = f"{module.rpartition('.')[2]}.py"
    path = next(iter(sorted((folder / "tests").rglob(name))))
    return f"{path.relative_to(folder).as_posix()}::{function}"


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def tests_of(mutation: Mutation, covered: Covered) -> list[str]:
    """The tests that run a line; of one that runs at import, as defaults do, all that run the file."""
    lines = covered.get(mutation.path, {})
    tests = lines.get(str(mutation.line))
    if tests == []:
        tests = sorted({test for others in lines.values() for test in others})
    return tests or []


def judged(mutation: Mutation, tests: Sequence[str], folder: Path, seconds: float) -> str:
    """Make the change in a copy, and see whether one of the tests fails; those named like the file come first."""
    if not tests:
        return UNTESTED
    path = folder / mutation.path
    source = path.read_bytes()
    ordered = sorted(tests, key=lambda test: (path.stem not in test, test))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ordered]
    try:
        path.write_bytes(mutation.applied(source))
        run = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return TOO_SLOW
    finally:
        path.write_bytes(source)
    return NOTICED if run.returncode else SURVIVED


def run_all(mutations: Sequence[Mutation], covered: Covered, folders: Sequence[Path], seconds: float) -> list[str]:
    """Judge each change, as many at a time as there are copies, and print what came of it."""
    explained = json.loads(EXPLAINED.read_text(encoding="utf-8")) if EXPLAINED.is_file() else {}
    free: Queue[Path] = Queue()
    for folder in folders:
        free.put(folder)

    def run(mutation: Mutation) -> str:
        folder = free.get()
        try:
            result = judged(mutation, tests_of(mutation, covered), folder, seconds)
        finally:
            free.put(folder)
        if result != NOTICED and mutation.name in explained:
            result = f"no difference: {explained[mutation.name]}"
        print(f"{mutation.path}:{mutation.line}  {mutation.before}  ->  {mutation.after}:  {result}", flush=True)
        return result

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(run, mutations))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=15, help="changed in each folder")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of lines")
    parser.add_argument("--only", metavar="FILE:LINE", help="all changes of one line")
    parser.add_argument("--seconds", type=float, default=600.0, help="for the tests of one change")
    parser.add_argument("--tests", nargs="+", default=[], help="what pytest is told")
    parser.add_argument("--coverage", type=Path, help="remembers which tests run which lines")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    mutations = sampled(arguments.lines, arguments.seed)
    if arguments.only:
        name, _, line = arguments.only.rpartition(":")
        every = mutations_of(name, (ROOT / name).read_text(encoding="utf-8"))
        mutations = [mutation for mutation in every if mutation.line == int(line)]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [copied(Path(temporary, str(number))) for number in range(AT_ONCE)]
        if arguments.coverage and arguments.coverage.is_file():
            covered: Covered = json.loads(arguments.coverage.read_text())
        else:
            covered = coverage_of(folders[0], arguments.tests)
            if arguments.coverage:
                arguments.coverage.write_text(json.dumps(covered))
        results = run_all(mutations, covered, folders, arguments.seconds)
    harmless = sum(result.startswith("no difference") for result in results)
    print(f"\n{results.count(NOTICED)} of {len(results)} noticed, {harmless} make no difference.")
    if arguments.json:
        rows = [{**asdict(m), "result": result} for m, result in zip(mutations, results, strict=True)]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(result in (SURVIVED, UNTESTED, TOO_SLOW) for result in results))


if __name__ == "__main__":
    main()
