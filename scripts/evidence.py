"""What mixing gains, on small tasks that a CPU trains: runs, and the tables of docs/evidence.md.

    python scripts/evidence.py images_100 --cifar FOLDER   # CIFAR-10 with 100 images a class, every way to mix
    python scripts/evidence.py images_500 --cifar FOLDER   # with 500, the main ways
    python scripts/evidence.py images_500_long --cifar FOLDER   # the same for 100 epochs, manifold mixup alone
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
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import evidence_images
import evidence_small
import torch
from evidence_images import IMAGES, Images, one_process
from evidence_small import METHODS, TASKS
from evidence_tables import tables

from mm_lightning.command.run_folder import environment
from mm_lightning.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results/evidence.json", ROOT / "docs/evidence.md"
SEEDS = 10  # of the small data; those of the images are theirs
# Of a run: task, method, seed, and what computes its numbers.
Run = tuple[str, str, int, Callable[[], dict[str, float]]]


def run_all(results: Path, part: str, command: str, runs: Iterable[Run]) -> None:
    """Make the runs that are not in ``results`` yet, and keep each there as soon as it is finished."""
    content = read(results)
    own = content.setdefault(part, {"command": command, "made_with": [], "runs": {}})
    made_with = _made_with()
    for task, method, seed, score in runs:
        seeds = own["runs"].setdefault(task, {}).setdefault(method, {})
        if str(seed) in seeds:
            continue
        begin = time.monotonic()
        found = score()
        seeds[str(seed)] = {key: round(value, 5) for key, value in found.items()}
        if made_with not in own["made_with"]:
            own["made_with"].append(made_with)
        write(results, content)
        print(f"{task}, {method}, seed {seed}: {time.monotonic() - begin:.1f} s {seeds[str(seed)]}", flush=True)


def read(results: Path) -> dict[str, Any]:
    """What has been measured, by part, task, method and seed."""
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


def write(results: Path, content: dict[str, Any]) -> None:
    """Keep it, with the numbers of a run in one line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    text = re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\s*\n\s*", " ", found.group()), text)
    with whole_file(results) as file:
        file.write(f"{text}\n".encode())


def _made_with() -> dict[str, Any]:
    """The environment: with the packages whose data or text are used, and the revision of what computes."""
    found = environment()
    found["packages"] |= {name: version(name) for name in ("scikit-learn", "scipy", "pandas", "pillow")}
    code = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "mm_lightning", "conf", "scripts"]
    if found["git_revision"] and not subprocess.run(code, capture_output=True, check=True).stdout:
        found["git_revision"] = found["git_revision"].removesuffix("-dirty")  # of results that were added
    return found


def runs_of_images(images: Images, folder: Path, groups: int | None = None) -> Iterator[Run]:
    """The runs of a budget, group by group, seed by seed; of the first ``groups`` groups, None for all."""
    for group in images.methods[:groups]:
        for seed in range(images.seeds):
            for method in group:
                yield "CIFAR-10", method, seed, partial(evidence_images.score, images, folder, method, seed)


def runs_of_small_data(seeds: int = SEEDS) -> Iterator[Run]:
    """All runs of the small data, seed by seed."""
    for seed in range(seeds):
        for name, task in TASKS.items():
            for method in task.methods:
                yield name, method, seed, partial(evidence_small.score, task, METHODS[method], seed)


def commands() -> str:
    """The commands of one run without mixing, of one with, and of one with label smoothing."""
    shown = [IMAGES["images_100"].command(method) for method in ("none", "manifold, alpha 1", "label smoothing")]
    return "```\n" + "\n".join(shown) + "\n```"


def write_page(page: Path, made: Mapping[str, str]) -> None:
    """Put each table in its place, between two lines with its name.

    Raises:
        ValueError: If the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in made.items():
        marker = f"<!-- {name}: made by python scripts/evidence.py -->\n"
        if text.count(marker) != 2:
            raise ValueError(f"{page} must hold the line {marker.strip()!r} twice, got {text.count(marker)}.")
        before, _, after = text.split(marker)
        text = f"{before}{marker}{table}\n{marker}{after}"
    with whole_file(page) as file:
        file.write(text.encode())


def main() -> None:
    """Make the runs of a part, if one is named, and write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*IMAGES, "small"])
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help="of the images")
    parser.add_argument("--groups", type=int, metavar="N", help="only the first N groups of methods of the images")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    command = f"python scripts/evidence.py {arguments.part}"
    if arguments.part == "small":
        run_all(RESULTS, "small", command, runs_of_small_data())
    elif arguments.part is not None:
        if arguments.cifar is None:
            parser.error(f"{arguments.part} needs --cifar FOLDER.")
        images, folder = IMAGES[arguments.part], arguments.cifar.resolve()
        with one_process(images, folder):
            run_all(
                RESULTS, arguments.part, f"{command} --cifar FOLDER", runs_of_images(images, folder, arguments.groups)
            )
    write_page(PAGE, {**tables(read(RESULTS)), "commands": commands()})


if __name__ == "__main__":
    main()
