"""Run the tests with other versions of what the package needs, and write what came of it into docs/compatibility.md.

    python scripts/matrix.py                             # all environments; each torch is some 5 GB
    python scripts/matrix.py lowest "torch 2.8"          # some; the rows of the others stay as they are
    python scripts/matrix.py lowest -- tests/mixup       # a part of the tests, to look at; nothing is written

Environments are made with venv and pip below ``--folder``, and again only if what they need changes. The interpreters
``python3.10`` and so on are looked for on the PATH. It ends with an error if a test fails.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RECORD = ROOT / "docs" / "results" / "matrix.json"
SECONDS_TO_INSTALL, SECONDS_TO_RUN = 1800, 3600
# Of the tests that are not slow.
TOOLS = ("pytest", "coverage", "jsonargparse[signatures]", "optuna", "scipy", "transformers")
OF_THE_RECORD = "tests/test_requirements.py::test_lower_bounds_are_those_that_the_tests_have_passed_with"
SHOWN = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy", "matplotlib", "tensorboard")

sys.path.insert(0, str(ROOT / "scripts"))

from environments import installed  # noqa: E402
from tables import between_marks, markdown_table  # noqa: E402


def requirements() -> list[str]:
    """What setup.cfg says that the package needs, reports included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["report"]
    return [line for line in lines.splitlines() if line]


def lower_bounds() -> dict[str, str]:
    """The lower bound of each requirement that has one, by its name."""
    return dict(line.split(" >= ") for line in requirements() if " >= " in line)


@dataclass(frozen=True)
class Environment:
    """Versions that the tests are run with.

    Attributes:
        name: What it is called.
        python: Its Python.
        requirements: What is installed beside the tests' own tools; what is not named is the newest that goes with it.
    """

    name: str
    python: str
    requirements: tuple[str, ...]


def environments() -> list[Environment]:
    """The lowest versions, the newest ones, and some between at which something changes."""
    bounds = lower_bounds()
    lowest = [f"{name}=={version}" for name, version in bounds.items()]
    lowest += [f"pytorch-lightning=={bounds['lightning']}", "networkx==3.2", "transformers==4.46.3"]
    return [
        Environment("lowest", "3.10", tuple(lowest)),
        Environment("torch 2.6", "3.11", ("torch==2.6.0", "lightning==2.4.0", "pytorch-lightning==2.4.0")),
        Environment("torch 2.8", "3.11", ("torch==2.8.0", "lightning==2.5.6", "pytorch-lightning==2.5.6")),
        Environment("torch 2.9", "3.12", ("torch==2.9.1", "lightning==2.6.6")),
        Environment("two Lightnings", "3.11", ("torch==2.13.0", "lightning==2.6.6", "pytorch-lightning==2.5.2")),
        Environment("newest", "3.13", ("torch==2.14.1", "lightning==2.6.6")),
    ]


def main() -> None:
    """Run the environments, and write the table of all that was ever run."""
    arguments = parse()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for environment in environments():
        if arguments.names and environment.name not in arguments.names:
            continue
        found = tried(environment, arguments.folder, arguments.tests)
        print(f"{environment.name}: {found['outcome']} ({found.get('seconds', 0)} s)", flush=True)
        for test in found.get("failed", ()):
            print(f"  {test}")
        record[environment.name] = found
        if not arguments.tests:
            ordered = {e.name: record[e.name] for e in environments() if e.name in record}
            RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(between_marks(page, "matrix", table(ordered)), encoding="utf-8")
    if any(found["outcome"] != "passed" for found in record.values()):
        sys.exit(1)


def parse() -> argparse.Namespace:
    """What was asked for."""
    names = [environment.name for environment in environments()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help=f"of {', '.join(names)}; else all")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "mm_lightning_matrix",
        help="where the environments are kept (default: %(default)s)",
    )
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    arguments.tests = words[split + 1 :]
    if unknown := set(arguments.names) - set(names):
        parser.error(f"unknown environments: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return arguments


def tried(environment: Environment, folder: Path, tests: list[str]) -> dict[str, Any]:
    """What the tests say in an environment."""
    asked = list(environment.requirements)
    python = shutil.which(f"python{environment.python}")
    if python is None:
        return {"outcome": f"not tried: python{environment.python} is not on the PATH", "asked": asked}
    wanted = [*asked, *TOOLS, "--editable", f"{ROOT}[report]"]
    interpreter = installed(folder / environment.name.replace(" ", "_"), python, wanted, SECONDS_TO_INSTALL)
    if not isinstance(interpreter, Path):
        return {"outcome": f"not tried: {interpreter}", "asked": asked}
    began = time.monotonic()
    cases = run(interpreter, tests)
    failed = sorted(name for name, outcome, _ in cases if outcome == "failed")
    skipped = Counter(reason for _, outcome, reason in cases if outcome == "skipped")
    return {
        "outcome": "passed" if cases and not failed else f"{len(failed)} failed" if cases else "nothing ran",
        "asked": asked,
        "python": environment.python,
        "versions": versions(interpreter),
        "passed": sum(outcome == "passed" for _, outcome, _ in cases),
        "failed": failed,
        "skipped": dict(skipped.most_common()),
        "seconds": round(time.monotonic() - began),
        "revision": git("describe", "--always", "--abbrev=10", "--dirty"),
    }


def run(interpreter: Path, tests: list[str]) -> list[tuple[str, str, str]]:
    """Name, outcome and reason of each test. Warnings are those of other versions, so they are no errors."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", f"--junitxml={report}"]
        options.append(f"--deselect={OF_THE_RECORD}")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = [interpreter, "-m", "pytest", *options, *tests]
        subprocess.run(command, cwd=ROOT, env=environment, timeout=SECONDS_TO_RUN, check=False)
        if not report.exists():
            return []
        return [outcome_of(case) for case in ElementTree.parse(report).iter("testcase")]


def outcome_of(case: ElementTree.Element) -> tuple[str, str, str]:
    """What a test's element says."""
    name = f"{case.get('classname')}::{case.get('name')}"
    for child in case:
        if child.tag in ("failure", "error"):
            return name, "failed", ""
        if child.tag == "skipped":
            return name, "skipped", child.get("message", "")
    return name, "passed", ""


def versions(interpreter: Path) -> dict[str, str]:
    """The versions that were installed."""
    code = f"from importlib.metadata import version; import json; print(json.dumps({{n: version(n) for n in {SHOWN}}}))"
    done = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def table(record: dict[str, Any]) -> str:
    """A line for each environment, and below it what was skipped."""
    head = ["environment", "Python", *SHOWN, "passed", "failed", "skipped"]
    lines = [[name, *row(found)] for name, found in record.items()]
    reasons = {reason for found in record.values() for reason in found.get("skipped", ())}
    told = [f"- {reason}: {', '.join(where(record, reason))}\n" for reason in sorted(reasons)]
    return f"{markdown_table(head, lines)}\nSkipped, and how many in which environments:\n\n{''.join(told)}"


def row(found: dict[str, Any]) -> list[str]:
    """An environment's cells."""
    if "versions" not in found:
        return ["–", *["–"] * len(SHOWN), found["outcome"], "–", "–"]
    known = [found["versions"][name].partition("+")[0] for name in SHOWN]
    return [found["python"], *known, *map(str, (found["passed"], len(found["failed"]), sum(found["skipped"].values())))]


def where(record: dict[str, Any], reason: str) -> list[str]:
    """The environments with tests that were skipped for a reason, and how many."""
    return [f"{name} ({n})" for name, found in record.items() if (n := found.get("skipped", {}).get(reason))]


if __name__ == "__main__":
    main()
