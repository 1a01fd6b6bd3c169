"""Train modules of public packages for a step under the callback, and write what came of it into docs/third_party.md.

    python scripts/third_party.py                      # all of it; installs each package in turn, some 1 GB each
    python scripts/third_party.py chemprop darts       # some packages; the rows of the others stay as they are

Packages are installed with pip into an environment each below ``--folder``, and again only if what they need changes.
It ends with an error if a step is neither exact nor refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "third_party.md"
RECORD = ROOT / "docs" / "results" / "third_party.json"
SECONDS_TO_INSTALL, SECONDS_TO_RUN = 420, 600

sys.path.insert(0, str(ROOT / "scripts"))

from environments import installed  # noqa: E402
from third_party.packages import BY_NAME, PACKAGES, Package  # noqa: E402

HEAD = """# Modules of public packages

Made by `python scripts/third_party.py`, which installs each package with pip into an environment of its own, builds its
LightningModules small ([scripts/third_party](../scripts/third_party)), and trains each for one step of {rows} rows:
plain, and mixed at the layers that `"auto"` chooses (marked \\*) and at some by name. A step is **exact** if its loss
and gradients are `lam * (of own targets) + (1 - lam) * (of the partners' targets)`, as two plain runs of the same step
say in which a hook mixes the layer's output: the number is a bound on the largest difference, as a share of the largest
gradient. It must be below 1e-9 in float64, or 1e-4 where a module computes in float32. Or it is **refused**, with
the message shown.

Of {total} steps of {modules} modules of {packages} packages, {exact} are exact, {refused} refused and {WRONG} neither.
{failing}

Packages marked † import `pytorch_lightning`, the same code as `lightning.pytorch` under another name. Their modules are
trained as they are, by the trainer of that name, which takes the callback as well; the other refuses such modules.

| package | module | how it computes its loss | layer | result |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Run the packages, and write the page of all that was ever run."""
    arguments = parse()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name in arguments.packages or BY_NAME:
        package = BY_NAME[name]
        began = time.monotonic()
        wanted = [*package.requirements, "lightning", "torchmetrics", package.distribution]
        python = installed(arguments.folder / package.name, sys.executable, wanted, SECONDS_TO_INSTALL)
        if isinstance(python, Path):
            found = run(package, python)
        else:
            found = {"version": "", "results": [], "problem": f"skipped: {python}"}
        record[name] = found
        counts = Counter(result["outcome"] for result in found["results"])
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or found.get("problem")
        print(f"{name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    record = {package.name: record[package.name] for package in PACKAGES if package.name in record}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")
    wrong = [r for found in record.values() for r in found["results"] if r["outcome"] in ("WRONG", "undecided")]
    if wrong:
        sys.exit("\n".join(f"{r['case']} at {r['layer']} is {r['outcome']}: {r['detail']}" for r in wrong))


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(BY_NAME)}; else all")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "mm_lightning_third_party",
        help="where the environments are kept (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.packages) - BY_NAME.keys():
        parser.error(f"unknown packages: {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    return arguments


def run(package: Package, python: Path) -> dict[str, Any]:
    """Train the package's modules in its environment."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, "-m", "third_party.runner", package.name]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_RUN
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {"version": "", "results": [], "problem": f"skipped: its modules cannot be built here ({last})"}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULTS "))
    return found


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    results = [result for found in record.values() for result in found["results"]]
    counts = Counter({"exact": 0, "refused": 0, "WRONG": 0}) + Counter(result["outcome"] for result in results)
    failing = counts.pop("plain training fails", 0)
    counts["WRONG"] += counts.pop("undecided", 0)
    head = HEAD.format(
        rows=7,
        total=len(results) - failing,
        modules=len({(name, result["case"]) for name, found in record.items() for result in found["results"]}),
        packages=sum(bool(found["results"]) for found in record.values()),
        failing=f"Without the callback, {failing} of the modules could not be trained." if failing else "",
        **{outcome: counts[outcome] for outcome in ("exact", "refused", "WRONG")},
    )
    lines = [
        row(BY_NAME[name], found["version"], result) for name, found in record.items() for result in found["results"]
    ]
    skipped = [f"- {BY_NAME[name].distribution}: {f['problem']}\n" for name, f in record.items() if f.get("problem")]
    return head + "".join(lines) + ("\nNot tried:\n\n" + "".join(skipped) if skipped else "")


def row(package: Package, version: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    layer = result["layer"] if result["layer"] == "–" else f"`{result['layer']}`"
    star = " *" if result["is_chosen"] else ""
    note = f"; with the warning: {result['note']}" if result["note"] else ""
    cells = (
        f"{package.distribution} {version}{' †' if package.imports_twin else ''}",
        result["case"],
        result["loss"],
        layer + star,
        f"{result['outcome']}: {result['detail']}{note}",
    )
    return "| " + " | ".join(re.sub(r"([|*_<])", r"\\\1", cell) for cell in cells) + " |\n"


if __name__ == "__main__":
    main()
