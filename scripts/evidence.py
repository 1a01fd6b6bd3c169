"""What mixing gains, on small tasks that a CPU trains: runs, and the tables of docs/evidence.md.

    python scripts/evidence.py images_100 --cifar FOLDER   # CIFAR-10 with 100 images a class, every way to mix
    python scripts/evidence.py images_500 --cifar FOLDER   # with 500, the main ways
    python scripts/evidence.py small                       # small data of six kinds
    python scripts/evidence.py                             # the tables once more, from docs/results/evidence.json

FOLDER holds ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``. Every command goes on where it was interrupted: what is
in docs/results/evidence.json is not run again. It uses one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mm_lightning.command.run_folder import environment
from mm_lightning.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results/evidence.json"
# Of a run: task, method, seed, and what computes its numbers.
Run = tuple[str, str, int, Callable[[], dict[str, float]]]


def run_all(results: Path, part: str, command: str, runs: Iterator[Run]) -> None:
    """Make the runs that are not in ``results`` yet, and keep each there as soon as it is finished."""
    content = _read(results)
    own = content.setdefault(part, {"command": command, "made_with": [], "runs": {}})
    made_with = environment()
    for task, method, seed, score in runs:
        seeds = own["runs"].setdefault(task, {}).setdefault(method, {})
        if str(seed) in seeds:
            continue
        begin = time.monotonic()
        found = score()
        seeds[str(seed)] = {key: round(value, 5) for key, value in found.items()}
        if made_with not in own["made_with"]:
            own["made_with"].append(made_with)
        _write(results, content)
        print(f"{task}, {method}, seed {seed}: {time.monotonic() - begin:.1f} s {seeds[str(seed)]}", flush=True)


def _read(results: Path) -> dict[str, Any]:
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


def _write(results: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    # the numbers of a run in one line
    text = re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\s*\n\s*", " ", found.group()), text)
    with whole_file(results) as file:
        file.write(f"{text}\n".encode())


def main() -> None:
    """Make the runs of a part, if one is named, and write the page's tables."""
    from evidence_images import IMAGES, one_process, score

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*IMAGES, "small"])
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help="of the images")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.part in IMAGES:
        if arguments.cifar is None:
            parser.error(f"{arguments.part} needs --cifar FOLDER.")
        images, folder = IMAGES[arguments.part], arguments.cifar.resolve()

        def runs() -> Iterator[Run]:
            for group in images.methods:
                for seed in range(images.seeds):
                    for method in group:
                        yield "CIFAR-10", method, seed, lambda m=method, s=seed: score(images, folder, m, s)

        command = shlex.join(["python", "scripts/evidence.py", arguments.part, "--cifar", "FOLDER"])
        with one_process(images, folder):
            run_all(RESULTS, arguments.part, command, runs())


if __name__ == "__main__":
    sys.exit(main())
