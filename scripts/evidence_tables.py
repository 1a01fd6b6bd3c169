"""The tables of docs/evidence.md, from what ``scripts/evidence.py`` has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_lightning.study.markdown import gain, markdown_table
from mm_lightning.study.statistics import MARGINS, Better, PairedComparison, compare_paired

# The numbers of each seed, by method.
Runs = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Measure:
    """A number of a run, and how it is shown.

    Attributes:
        key: Its name in a run.
        title: Its heading.
        better: The direction of improvement.
        margin: The largest difference that does not matter, before ``factor``; None knows none.
        factor: What it is multiplied by for display.
        digits: Shown behind the point.
    """

    key: str
    title: str
    better: Better
    margin: float | None
    factor: float = 1.0
    digits: int = 3

    def text(self, values: Sequence[float]) -> str:
        """The mean."""
        return f"{self.factor * float(np.mean(values)):.{self.digits}f}"

    def compare(self, runs: Runs, method: str, other: str) -> PairedComparison | None:
        """Method - other over the seeds that both have, as displayed; None for fewer than two."""
        seeds = sorted({*runs[method]} & {*runs[other]})
        if len(seeds) < 2:
            return None
        differences = [self.factor * (runs[method][s][self.key] - runs[other][s][self.key]) for s in seeds]
        return compare_paired(differences, self.better, None if self.margin is None else self.factor * self.margin)

    def over(self, runs: Runs, method: str, other: str) -> str:
        """That comparison in words; nothing for a method itself, and without seeds in common."""
        found = None if method == other else self.compare(runs, method, other)
        return "" if found is None else gain(found, self.digits)


ACCURACY = Measure("acc", "accuracy, %", "higher", MARGINS["acc"], 100.0, 2)
NLL = Measure("nll", "NLL, nats", "lower", MARGINS["nll"])
NLL_SCALED = Measure("nll_scaled", "NLL at its temperature", "lower", MARGINS["nll"])
ECE = Measure("ece", "ECE", "lower", MARGINS["ece"])
ECE_SCALED = Measure("ece_scaled", "ECE at its temperature", "lower", MARGINS["ece"])
EXPLAINED = Measure("r2", "R², %", "higher", None, 100.0, 2)

# Packages whose versions stand on the page.
SHOWN = ("torch", "lightning", "numpy", "scikit-learn", "scipy", "pandas", "pillow")
# What could be the callback's default, among methods of the small data, and among those of the images.
DEFAULT = "auto, alpha 2"
CANDIDATES = {
    "input, alpha 1": "input, alpha 1",
    "input, alpha 2": "input",
    "first hidden layer, alpha 2": "first stage",
    "auto, alpha 0.2": "manifold, alpha 0.2",
    "auto, alpha 1": "manifold, alpha 1",
    DEFAULT: "manifold",
    "auto, alpha 1, until 80 %": "manifold_until80, alpha 1",
    "auto, alpha 2, until 80 %": "manifold_until80",
}


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Every table that there are runs for, by its name on the page."""
    made = {}
    for part in ("images_100", "images_500", "images_500_long"):
        if part in content:
            runs = finished(content[part]["runs"]["CIFAR-10"])
            made[f"{part} accuracy"] = of_methods(runs, (ACCURACY, NLL, NLL_SCALED))
            made[f"{part} calibration"] = of_methods(runs, (ECE, ECE_SCALED), with_temperature=True)
    if "small" in content:
        small = {task: finished(runs) for task, runs in content["small"]["runs"].items()}
        made["small accuracy"] = of_tasks(small, ACCURACY)
        made["small NLL"] = of_tasks(small, NLL)
        by_task = dict(small)
        if "images_100" in content:
            images = finished(content["images_100"]["runs"]["CIFAR-10"])
            by_task["CIFAR-10"] = {name: images[own] for name, own in CANDIDATES.items() if own in images}
        for name, measure in (("accuracy", ACCURACY), ("NLL", NLL)):
            made[f"over the default {name}"] = over_default(by_task, measure)
            made[f"default {name}"] = of_defaults(by_task, measure)
    if content:
        made["versions"] = made_with(content)
    return made


def finished(runs: Runs) -> Runs:
    """The methods that have the most seeds: means over others than theirs would be of other data."""
    most = max(len(seeds) for seeds in runs.values())
    return {name: seeds for name, seeds in runs.items() if len(seeds) == most}


def made_with(content: Mapping[str, Any]) -> str:
    """A line for each part: its command, its runs and what made them."""
    rows = {}
    for own in content.values():
        made = [run for runs in own["runs"].values() for seeds in runs.values() for run in seeds.values()]
        seconds = [run["seconds"] for run in made if "seconds" in run]
        median = f"{np.median(seconds):.0f}" if seconds else "–"
        versions = {f"Python {found['python']}": None for found in own["made_with"]}
        for found in own["made_with"]:
            versions |= {f"{name} {found['packages'][name]}": None for name in SHOWN if name in found["packages"]}
        revisions = dict.fromkeys(str(found["git_revision"])[:7] for found in own["made_with"])
        rows[f"`{own['command']}`"] = [str(len(made)), median, ", ".join(versions), ", ".join(revisions)]
    return markdown_table(["runs", "seconds of a run, median", "versions", "git revision"], rows)


def of_methods(runs: Runs, measures: Sequence[Measure], with_temperature: bool = False) -> str:
    """A line for each method: means, and paired differences to none; the best accuracy first."""
    columns = [cell for one in measures for cell in (one.title, "over none")]
    columns += ["temperature"] if with_temperature else []
    rows = {}
    for name in sorted(runs, key=lambda name: -np.mean(_values(runs, name, "acc"))):
        cells = []
        for one in measures:
            cells += [one.text(_values(runs, name, one.key)), one.over(runs, name, "none")]
        if with_temperature:
            cells.append(f"{np.mean(_values(runs, name, 'temperature')):.2f}")
        rows[_named(name)] = cells
    return markdown_table(columns, rows)


def of_tasks(by_task: Mapping[str, Runs], measure: Measure) -> str:
    """A line for each method, a column for each task: the mean and the paired difference to none."""
    shown = _with_measure(by_task, measure)
    names = list(dict.fromkeys(name for runs, _ in shown.values() for name in runs))
    rows: dict[str, list[str]] = {name: [] for name in names}
    for runs, own in shown.values():
        for name in names:
            found = own.over(runs, name, "none") if name in runs else ""
            mean = own.text(_values(runs, name, own.key)) if name in runs else "–"
            rows[name].append(f"{mean}, {found}" if found else mean)
    return markdown_table([_of_task(task, own, measure) for task, (_, own) in shown.items()], rows)


def over_default(by_task: Mapping[str, Runs], measure: Measure) -> str:
    """A line for each candidate: its paired difference to what is the default in each task."""
    shown = _with_measure(by_task, measure)
    rows = {
        name: [
            own.over(runs, name, DEFAULT) if name in runs and DEFAULT in runs else "–" for runs, own in shown.values()
        ]
        for name in CANDIDATES
        if name != DEFAULT
    }
    return markdown_table([_of_task(task, own, measure) for task, (_, own) in shown.items()], rows)


def of_defaults(by_task: Mapping[str, Runs], measure: Measure) -> str:
    """A line for each candidate: its paired difference to the best of them in each task, and where it is not worse."""
    shown = _with_measure(by_task, measure)
    rows: dict[str, list[str]] = {name: [] for name in CANDIDATES}
    counts = dict.fromkeys(CANDIDATES, 0)
    tried = dict.fromkeys(CANDIDATES, 0)
    for runs, own in shown.values():
        there = [name for name in CANDIDATES if name in runs]
        sign = 1 if own.better == "higher" else -1
        best = max(there, key=lambda name: sign * np.mean(_values(runs, name, own.key)))
        for name in CANDIDATES:
            found = own.compare(runs, name, best) if name in there and name != best else None
            is_worse = found is not None and found.outcome == "worse"
            tried[name] += name in there
            counts[name] += name in there and not is_worse
            text = "–" if name not in there else "best" if name == best else "" if found is None else _plain(found, own)
            rows[name].append(text)
    for name in CANDIDATES:
        rows[name].append(f"{counts[name]} of {tried[name]}")
    columns = [_of_task(task, own, measure) for task, (_, own) in shown.items()]
    return markdown_table([*columns, "not worse than the best"], rows)


def _with_measure(by_task: Mapping[str, Runs], measure: Measure) -> dict[str, tuple[Runs, Measure]]:
    """The tasks that have the measure; R² stands for the accuracy where a number is learned."""
    found = {}
    for task, runs in by_task.items():
        keys = next(iter(next(iter(runs.values())).values()))
        own = EXPLAINED if measure is ACCURACY and EXPLAINED.key in keys else measure
        if own.key in keys:
            found[task] = (runs, own)
    return found


def _of_task(task: str, own: Measure, measure: Measure) -> str:
    return task if own is measure else f"{task}, {own.title}"


def _plain(found: PairedComparison, measure: Measure) -> str:
    half = "" if found.half_width is None else f" ± {found.half_width:.{measure.digits}f}"
    text = f"{round(found.difference, measure.digits) + 0.0:+.{measure.digits}f}{half}".replace("-", "−")
    return f"{text} (worse)" if found.outcome == "worse" else text


def _named(name: str) -> str:
    is_a_file = "," not in name and " " not in name and name != "none"
    return f"[`{name}`](methods/{name}.md)" if is_a_file else name


def _values(runs: Runs, name: str, key: str) -> list[float]:
    return [numbers[key] for _, numbers in sorted(runs[name].items())]
