"""The finished runs of one experiment and schedule, and what pictures of them have in common."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from mm_lightning.study.form import Picture
from mm_lightning.study.jobs import Job
from mm_lightning.study.runner import CONFIG, METRICS
from mm_lightning.study.small_png import save_small_png

Arrays = dict[str, np.ndarray]

WIDTH = 1700  # pixels: a README shows 850, on many screens with two pixels to each
SETS = {"train": "training set", "test": "test set"}


@dataclass(frozen=True)
class ScheduleRuns:
    """The runs of a schedule, method by method.

    Attributes:
        jobs: In the order of the methods.
        titles: Of the methods, by name.
        folder: Where pictures are put.
        is_first: Whether the schedule is the experiment's first, which pictures need not name.
    """

    jobs: Sequence[Job]
    titles: Mapping[str, str]
    folder: Path
    is_first: bool

    @property
    def experiment(self) -> str:
        """Its name."""
        return self.jobs[0].experiment

    @property
    def methods(self) -> str:
        """Their titles in a line."""
        return ", ".join(dict.fromkeys(self.titles[job.method] for job in self.jobs))

    @property
    def seeds(self) -> str:
        """The seeds in words, as in ``seeds 0, 1, 2``."""
        seeds = sorted({job.seed for job in self.jobs})
        return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    @property
    def ending(self) -> str:
        """How titles name the schedule."""
        return "" if self.is_first else f", {self.jobs[0].schedule} schedule"

    def of_lowest_seed(self) -> ScheduleRuns:
        """Return one run for each method: of the lowest seed that all have, or else of the lowest that each has."""
        seeds: dict[str, set[int]] = {}
        for job in self.jobs:
            seeds.setdefault(job.method, set()).add(job.seed)
        common = set.intersection(*seeds.values())
        chosen = {method: min(common or own) for method, own in seeds.items()}
        return replace(self, jobs=[job for job in self.jobs if job.seed == chosen[job.method]])

    def diagnostic(self, key: str, default: str) -> str:
        """Return a setting of the diagnostics, as in ``hidden_space.layer``."""
        return str(
            OmegaConf.select(OmegaConf.load(self.jobs[0].folder / CONFIG), f"diagnostics.{key}", default=default)
        )

    def arrays(self, file: str) -> dict[str, list[Arrays]]:
        """Read a ``.npz`` file of every run.

        Args:
            file: Its name in the runs' folders of figures.

        Returns:
            The content by title of the method, of each seed; nothing if no run has the file. A run that lacks what
            others have, as one that diverged does, is left out and named on stderr.
        """
        paths = {job: job.folder / "figures" / file for job in self.jobs}
        having = [job for job, path in paths.items() if path.is_file()]
        for job in self.jobs if having else []:
            if job not in having:
                print(f"{job.folder} holds no figures/{file}: the picture is drawn without it.", file=sys.stderr)
        found: dict[str, list[Arrays]] = {}
        for job in having:
            with np.load(paths[job]) as content:
                found.setdefault(self.titles[job.method], []).append(dict(content))
        return found

    def mean_metrics(self, keys: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Return means over the seeds, by title of the method and name; a metric that a run lacks is left out for all.

        Args:
            keys: The metric of each name.
        """
        values: dict[str, dict[str, list[float | None]]] = {name: {} for name in keys}
        for job in self.jobs:
            metrics = json.loads((job.folder / METRICS).read_text(encoding="utf-8"))["metrics"]
            for name, key in keys.items():
                values[name].setdefault(self.titles[job.method], []).append(metrics.get(key))
        means: dict[str, dict[str, float]] = {self.titles[job.method]: {} for job in self.jobs}
        for name, methods in values.items():
            known = {title: [seed for seed in seeds if seed is not None] for title, seeds in methods.items()}
            if known == methods:
                for title, seeds in known.items():
                    means[title][name] = mean(seeds)
        return means

    def picture(self, kind: str, figure: Figure, title: str, caption: str, alt: str) -> Picture:
        """Save a figure of these runs.

        Args:
            kind: Second part of the file's name, after the experiment.
            figure: The figure.
            title: Without the schedule.
            caption: Without seeds and schedule.
            alt: Without the methods.
        """
        schedule = self.jobs[0].schedule
        file = "_".join([self.experiment, kind, *([] if self.is_first else [schedule])]) + ".png"
        save_small_png(figure, self.folder / file, WIDTH)
        return Picture(
            file=file,
            title=title + self.ending,
            caption=f"{caption} {self.seeds.capitalize()}, {schedule} schedule.",
            alt=f"{alt}, for {self.methods}.",
            commands=[job.command for job in self.jobs],
        )
