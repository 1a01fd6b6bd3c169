"""The paper's protocol in as many epochs as there is time for: all methods at once on one GPU.

    python scripts/protocol_runs.py binary FOLDER TO   # CIFAR-10 as FOLDER/train/CLASS/*.jpg, in the official form
    python scripts/protocol_runs.py train TO --epochs 40 --seeds 3 --json runs.json
    python scripts/protocol_runs.py table benchmarks/protocol_gpu.json   # of what has been trained, in docs/protocol.md

The second trains every method, seed after seed, each as the command that the file names does, and divides the learning
rate by ten after one half and three quarters of the epochs, as the experiment does with 100 and 150 of its 200.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXPERIMENT = "cifar10_preactresnet18"
METHODS = {
    "none": ["mixup=none"],
    "input": ["mixup=input", "alpha=1"],
    "manifold": ["mixup=manifold"],
    "manifold_until80": ["mixup=manifold_until80"],
}
CURVES = ("val/acc", "val/nll", "train/loss")
_BATCHES = 5  # files of training images


def main() -> None:
    """Write the data, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    binary = commands.add_parser("binary", help="write JPEG files in the form of the official archive")
    binary.add_argument("folder", type=Path)
    binary.add_argument("to", type=Path)
    train = commands.add_parser("train", help="train all methods at once")
    train.add_argument("root", type=Path, help="data.root")
    train.add_argument("--epochs", type=int, default=40)
    train.add_argument("--seeds", type=int, default=3)
    train.add_argument("--methods", default=",".join(METHODS), help="of them, with commas between")
    train.add_argument("--set", default="", help="more words for each command, e.g. 'loss=cross_entropy'")
    train.add_argument(
        "--minutes", type=float, default=math.inf, help="in which runs must end: else none begins, or it is stopped"
    )
    train.add_argument("--revision", help="of the code, where this is no checkout")
    train.add_argument("--json", type=Path, help="file for the numbers")
    shown = commands.add_parser("table", help="print the numbers of a file as Markdown")
    shown.add_argument("json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "binary":
        write_binary(arguments.folder, arguments.to)
    elif arguments.command == "table":
        print(table(json.loads(arguments.json.read_text(encoding="utf-8"))["runs"]))
    else:
        train_all(arguments)


def train_all(arguments: argparse.Namespace) -> None:
    """Train as the command line says, and keep the numbers."""
    begin = time.monotonic()
    deadline, longest, runs = begin + 60 * arguments.minutes, 0.0, []
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"--methods must be of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}.")
    for seed in range(arguments.seeds):
        started = time.monotonic()
        if started + longest > deadline:
            break
        commands = {method: command(method, seed, arguments.epochs, shlex.split(arguments.set)) for method in methods}
        made = train_at_once(commands, arguments.root.resolve(), deadline)
        longest = time.monotonic() - started
        runs += [{**run, "seed": seed, "seconds_of_all": round(longest, 1)} for run in made]
    content = {"runs": runs, "at_once": len(methods), **machine()}
    if arguments.revision:
        content["git_revision"] = arguments.revision
    for run in runs:
        print(run["method"], run["seed"], run["metrics"])
    print(f"{time.monotonic() - begin:.0f} s, {content['device']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_binary(folder: Path, to: Path) -> None:
    """Write ``folder/train`` and ``folder/test``, a folder of images for each class, as cifar-10-batches-bin."""
    classes = sorted(path.name for path in (folder / "train").iterdir())
    official = to / "cifar-10-batches-bin"
    official.mkdir(parents=True, exist_ok=True)
    (official / "batches.meta.txt").write_text("\n".join(classes) + "\n", encoding="ascii")
    with ProcessPoolExecutor() as pool:
        for split in ("train", "test"):
            parts = pool.map(
                _records, *zip(*((folder / split / name, k) for k, name in enumerate(classes)), strict=True)
            )
            rows = np.concatenate(list(parts))
            names = [f"data_batch_{i + 1}.bin" for i in range(_BATCHES)] if split == "train" else ["test_batch.bin"]
            for name, part in zip(names, np.array_split(rows, len(names)), strict=True):
                (official / name).write_bytes(part.tobytes())


def _records(folder: Path, label: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Label and pixels (3, 32, 32) of each image, (N, 3073)."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))]
    pixels = np.stack(images).transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.full((len(images), 1), label, np.uint8), pixels], axis=1)


def command(method: str, seed: int, epochs: int, more: Sequence[str] = ()) -> list[str]:
    """What is typed for a run, with FOLDER for that of the data."""
    return [
        *("python", "-m", "mm_lightning.train", f"+experiment={EXPERIMENT}", "data.root=FOLDER", "trainer=gpu"),
        *(f"max_epochs={epochs}", f"scheduler.milestones=[{epochs // 2},{3 * epochs // 4}]", "logger=csv"),
        *(*METHODS[method], f"seed={seed}", *more),
    ]


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each run that ended."""
    heads = ["`mixup=`", "seed", "accuracy, %", "median of the last epochs, %", "NLL, nats", "ECE"]
    heads.append("mixed accuracy in training, %")
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for run in runs:
        found = run["metrics"]
        if "test/acc" not in found:
            continue
        (median,) = (value for key, value in found.items() if key.startswith("test/acc_median"))
        percents = [_shown(value, 100, 2) for value in (found["test/acc"], median, found["train/acc_mixed"])]
        cells = [run["method"], str(run["seed"]), *percents[:2]]
        cells += [_shown(found["test/nll"], 1, 3), _shown(found["test/ece"], 1, 3), percents[2]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None, factor: float, digits: int) -> str:
    return "no number" if value is None else f"{factor * value:.{digits}f}"


def train_at_once(commands: dict[str, list[str]], root: Path, deadline: float) -> list[dict[str, Any]]:
    """Run all commands together; of one that fails or is stopped keep the curves, and the end of what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as place, ExitStack() as running:
        processes, folders = [], [Path(place) / str(number) for number in range(len(commands))]
        for folder, words in zip(folders, commands.values(), strict=True):
            line = [sys.executable, *words[1:], f"data.root={root}", f"hydra.run.dir={folder}"]
            log = running.enter_context(folder.with_suffix(".txt").open("w", encoding="utf-8"))
            processes.append(subprocess.Popen(line, stdout=log, stderr=log, env=environment))
            running.callback(processes[-1].wait)
            running.callback(processes[-1].kill)  # which is nothing to one that has ended
        for process in processes:
            left = deadline - time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                process.wait(None if math.isinf(left) else max(0.1, left))
        running.close()
        return [
            {
                "method": method,
                "command": shlex.join(words),
                "metrics": _metrics(folder),
                "curves": _curves(folder),
                **({"failed": folder.with_suffix(".txt").read_text()[-2000:]} if process.returncode else {}),
            }
            for (method, words), folder, process in zip(commands.items(), folders, processes, strict=True)
        ]


def _metrics(folder: Path) -> dict[str, float | None]:
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}


def _curves(folder: Path) -> dict[str, list[float | None]]:
    """What was logged, in the order of the steps; None for what is no number, as in metrics.json."""
    found: dict[str, list[float | None]] = {name: [] for name in CURVES}
    for path in folder.glob("csv/metrics.csv"):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name in CURVES:
                    if row.get(name):
                        value = float(row[name])
                        found[name].append(float(f"{value:.5g}") if math.isfinite(value) else None)
    return found


def machine() -> dict[str, Any]:
    """The GPU, and the versions."""
    import torch

    from mm_lightning.command.run_folder import environment

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": device, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **environment()}


if __name__ == "__main__":
    main()
