"""Ask pip which release of public packages it takes alone and beside this one, and write it into docs/compatibility.md.

    python scripts/beside.py                       # nothing is installed; a few minutes, and some downloads
    python scripts/beside.py careamics schnetpack  # some; the rows of the others stay as they are

It ends with an error if beside this one pip takes another release of a package, or of what both need, than alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RECORD = ROOT / "docs" / "results" / "beside.json"
PACKAGES = (
    "pytorch-tabular",
    "lightning-pose",
    "careamics",
    "mambular",
    "schnetpack",
    "torchphysics",
    "rectools[lightning]",
)
HELD = ("nvidia-dali-cuda110",)  # not on the index that pip asks: taken as installed
COMMON = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy", "matplotlib")
SECONDS = 900

sys.path.insert(0, str(ROOT / "scripts"))

from tables import between_marks, markdown_table  # noqa: E402


def main() -> None:
    """Ask for the packages, and write the table of all that were ever asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"else {', '.join(PACKAGES)}")
    names = parser.parse_args().packages or PACKAGES
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        (site,) = Path(folder).glob("lib/python*/site-packages")
        for name in HELD:
            place = site / f"{name.replace('-', '_')}-99.dist-info"
            place.mkdir()
            (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
        for name in names:
            record[name] = {"alone": answer(python, name), "beside": answer(python, name, str(ROOT))}
            print(f"{name}: {record[name]}", flush=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(between_marks(PAGE.read_text(encoding="utf-8"), "beside", table(record)), encoding="utf-8")
    if changed := [name for name, found in record.items() if found["alone"].items() - found["beside"].items()]:
        sys.exit(f"Beside this package something else is taken: {', '.join(changed)}.")


def answer(python: Path, name: str, *others: str) -> dict[str, str]:
    """The versions that pip would install into an empty environment; or why it would not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", f"--report={report}", name, *others]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {"problem": f"no answer in {SECONDS // 60} minutes"}
        except subprocess.CalledProcessError as error:
            lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
            return {"problem": next((line for line in lines if "rror: " in line), lines[-1] if lines else "?")}
        entries = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    found = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in entries}
    own = name.partition("[")[0]
    return {one: found[one] for one in (own, *COMMON) if one in found}


def table(record: dict[str, Any]) -> str:
    """A line for each package, and for what both need."""
    head = ["package", "alone", "beside", *COMMON]
    lines = []
    for name, found in record.items():
        own = name.partition("[")[0]
        alone, beside = (found[which].get(own, found[which].get("problem", "–")) for which in ("alone", "beside"))
        pairs = [(found["alone"].get(one, "–"), found["beside"].get(one, "–")) for one in COMMON]
        lines.append([name, alone, beside, *(a if a == b else f"{a} → {b}" for a, b in pairs)])
    return markdown_table(head, lines)


if __name__ == "__main__":
    main()
