"""What ``mm-evaluate`` finds on runs of the reproduction, and the table of docs/evaluation.md.

    python scripts/evaluation_table.py REPRODUCTION   # the folder of python -m mm_lightning.reproduce: six of its runs
    python scripts/evaluation_table.py                # the table once more, from docs/results/evaluation

Runs are evaluated one after the other, and what was found before is overwritten.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tables import between_marks, markdown_table

from mm_lightning.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results/evaluation", ROOT / "docs/evaluation.md"
METHODS = {"none": "baseline", "manifold": "manifold"}  # their names in the reproduction
# What is asked for; an epsilon of the spirals is one of the range of each coordinate.
MNIST = ("--all", "--epsilon", "0.1,0.3", "--rows", "2000")
ASKED = {"spiral": ("--all",), "mnist_bottleneck": MNIST, "mnist_flatness": MNIST}

# Columns: title, where the number is, factor, digits. Of an attack there is one for MNIST and one for the spirals.
_FGSM, _PGD = "evaluation/attacks/fgsm", "evaluation/attacks/pgd"
COLUMNS: tuple[tuple[str, tuple[str, ...], float, int], ...] = (
    ("accuracy", ("evaluation/scores/acc",), 100, 1),
    ("NLL", ("evaluation/scores/nll",), 1, 3),
    ("at T", ("evaluation/scores_scaled/nll",), 1, 3),
    ("ECE", ("evaluation/scores/ece",), 1, 3),
    ("at T", ("evaluation/scores_scaled/ece",), 1, 3),
    ("Brier", ("evaluation/scores/brier",), 1, 3),
    ("T (95 %)", ("evaluation/temperature",), 1, 2),
    ("FGSM", (f"{_FGSM}_0.1/acc", f"{_FGSM}_0.0314/acc"), 100, 1),
    ("PGD", (f"{_PGD}_0.1/acc", f"{_PGD}_0.0314/acc"), 100, 1),
    ("rotated ±40°", ("evaluation/deformations/rotation_40/acc",), 100, 1),
    ("zoomed out 140 %", ("evaluation/deformations/zoom_1.4/acc",), 100, 1),
    ("noise 3", ("evaluation/shifts/noise_3/acc",), 100, 1),
    ("blur 3", ("evaluation/shifts/blur_3/acc",), 100, 1),
    ("contrast 1", ("evaluation/shifts/contrast_1/acc",), 100, 1),
    ("5 nearest", ("evaluation/neighbours/*/acc",), 100, 1),
    ("others' share", ("evaluation/spectra/*/others_share",), 1, 2),
)


def at(content: Any, place: str) -> Any:
    """What is at a place, "*" being the only name there is; None if there is nothing."""
    for name in place.split("/"):
        if not isinstance(content, dict):
            return None
        content = next(iter(content.values())) if name == "*" and len(content) == 1 else content.get(name)
    return content


def cell(content: Any, places: tuple[str, ...], factor: float, digits: int) -> str:
    """A number, a temperature with its interval, or a dash."""
    found = next((value for place in places if (value := at(content, place)) is not None), None)
    if found is None:
        return "–"
    if isinstance(found, dict):
        temperature, low, high = (f"{found[key]:.{digits}f}" for key in ("temperature", "low", "high"))
        return f"{temperature} ({low} to {high})"
    return f"{factor * found:.{digits}f}"


def table() -> str:
    """A line for each run."""
    lines = []
    for experiment in ASKED:
        for method in METHODS:
            content = json.loads((RESULTS / f"{experiment}-{method}.json").read_text(encoding="utf-8"))
            lines.append([f"`{experiment}`", method, *(cell(content, *column[1:]) for column in COLUMNS)])
    return markdown_table(["run", "mixup", *(column[0] for column in COLUMNS)], lines)


def evaluate(reproduction: Path) -> None:
    """Evaluate the run with seed 0 on the default schedule of none and of manifold mixup in each experiment."""
    for experiment, asked in ASKED.items():
        for method, name in METHODS.items():
            run = f"runs/{experiment}/default/{name}/seed0"
            with TemporaryDirectory() as place:  # it writes events beside the numbers
                out = Path(place) / "evaluation.json"
                command = [sys.executable, "-m", "mm_lightning.evaluate", run, *asked, "--out", str(out)]
                subprocess.run(command, cwd=reproduction, check=True)
                shutil.copy(out, RESULTS / f"{experiment}-{method}.json")


def main() -> None:
    """Evaluate, if runs are named, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reproduction", nargs="?", type=Path, metavar="REPRODUCTION")
    arguments = parser.parse_args()
    if arguments.reproduction is not None:
        evaluate(arguments.reproduction)
    page = between_marks(PAGE.read_text(encoding="utf-8"), "runs of the findings", table())
    with whole_file(PAGE) as file:
        file.write(page.encode())


if __name__ == "__main__":
    main()
