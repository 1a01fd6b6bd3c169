"""The ways to mix, compared: from the folder of a sweep to a table of paired differences.

    python -m mm_lightning.train +experiment=mnist_1000 -m +sweep=joblib 'mixup=glob(*,exclude=tokens)' seed=0,1,2,3,4
    python scripts/method_study.py multirun/mnist_1000/...    # docs/results/methods.json and docs/methods/study.md
    python scripts/method_study.py                            # the page once more, from docs/results/methods.json

Differences are judged by ``mm_lightning.study.statistics``: runs of one seed have the same data and first weights.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from mm_lightning.files import whole_file, write_json
from mm_lightning.study.markdown import gain
from mm_lightning.study.statistics import MARGINS, Better, compare_paired

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results/methods.json", ROOT / "docs/methods/study.md"
MARKER = "<!-- made by python scripts/method_study.py -->\n"
# Key, heading, factor, digits, and which way is better.
MEASURES: tuple[tuple[str, str, float, int, Better], ...] = (
    ("test/acc", "accuracy, %", 100.0, 2, "higher"),
    ("test/nll", "NLL, nats", 1.0, 3, "lower"),
    ("test/ece", "ECE", 1.0, 3, "lower"),
)


def collect(folder: Path) -> dict[str, Any]:
    """Read the runs of a sweep.

    Raises:
        ValueError: If there are none, or not every method has every seed.
    """
    runs: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        choices = dict(word.split("=", 1) for word in found["overrides"])
        metrics = {key: round(found["metrics"][key], 6) for key, *_ in MEASURES}
        runs.setdefault(choices["mixup"], {})[str(found["seed"])] = {**metrics, "seconds": found["fit_seconds"]}
    if not runs or len({tuple(sorted(seeds)) for seeds in runs.values()}) != 1:
        missing = {name: sorted(seeds) for name, seeds in runs.items()}
        raise ValueError(f"{folder} must hold the same seeds of each method, got {missing or 'no finished run'}.")
    shared = [word for word in found["overrides"] if word.split("=")[0] not in ("mixup", "seed")]
    made_with = {key: found[key] for key in ("git_revision", "packages", "python", "platform") if key in found}
    command = ["python", "-m", "mm_lightning.train", *shared, "-m", "mixup=glob(*,exclude=tokens)", "seed=0,1,2,3,4"]
    return {"command": shlex.join(command), "runs": runs, **made_with}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A line for each method: means, and paired differences to no mixup, in bold where they are better."""
    titles = [title for _, title, *_ in MEASURES]
    columns = ["method", *(cell for title in titles for cell in (title, "over none"))]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    order = sorted(runs, key=lambda name: -_values(runs[name], MEASURES[0][0]).mean())
    for name in order:
        cells = [f"[`{name}`]({name}.md)" if name != "none" else "`none`"]
        for key, _, factor, digits, better in MEASURES:
            values, none = (factor * _values(runs[other], key) for other in (name, "none"))
            found = compare_paired(list(values - none), better, factor * MARGINS[key.removeprefix("test/")])
            cells += [f"{values.mean():.{digits}f}", "" if name == "none" else gain(found, digits)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _values(seeds: dict[str, Any], key: str) -> np.ndarray:
    return np.array([seeds[seed][key] for seed in sorted(seeds)])


def main() -> None:
    """Collect runs, if a folder is given, and write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the sweep")
    folder = parser.parse_args().folder
    if folder is not None:
        write_json(RESULTS, collect(folder))
    made = table(json.loads(RESULTS.read_text(encoding="utf-8"))["runs"])
    before, _, after = PAGE.read_text(encoding="utf-8").split(MARKER)
    with whole_file(PAGE) as file:
        file.write(f"{before}{MARKER}{made}\n{MARKER}{after}".encode())


if __name__ == "__main__":
    main()
