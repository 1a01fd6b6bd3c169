"""Which trainings a study consists of."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

QUICK = "quick"  # the one schedule of a quick study


@dataclass(frozen=True)
class Job:
    """One training of a study.

    Attributes:
        experiment: Name of the experiment.
        method: Name of the method.
        schedule: Name of the schedule.
        seed: Seed of the run.
        overrides: What Hydra is told, beside the seed and the folder.
        folder: The run's folder.
        base: What stands before the overrides; None is the experiment's.
        unshown: What changes what a run keeps, not what it computes, and is left out of the command shown.
    """

    experiment: str
    method: str
    schedule: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    base: tuple[str, ...] | None = None
    unshown: tuple[str, ...] = ("callbacks=last",)

    @property
    def name(self) -> str:
        """The job in a line, as progress and errors name it."""
        return f"{self.experiment} {self.method} {self.schedule} seed {self.seed}"

    @property
    def command(self) -> str:
        """The command that repeats the run by hand."""
        return shlex.join(["python", "-m", "mm_lightning.train", *self._words])

    @property
    def arguments(self) -> list[str]:
        """What the command line of ``mm_lightning.train`` is called with."""
        return [*self._words, *self.unshown, f'hydra.run.dir="{self.folder}"']

    def arguments_for(self, launcher: Sequence[str]) -> list[str]:
        """The same for a run that a launcher of Hydra's makes: a sweep of one, in the run's own folder."""
        if not launcher:
            return self.arguments
        place = [f'hydra.sweep.dir="{self.folder}"', "hydra.sweep.subdir=."]
        return ["--multirun", *self._words, *self.unshown, *launcher, *place]

    @property
    def _words(self) -> list[str]:
        base = (f"+experiment={self.experiment}",) if self.base is None else self.base
        return [*base, *self.overrides, f"seed={self.seed}"]


def jobs_of(config: DictConfig) -> list[Job]:
    """List the trainings of a study, in the order they are run.

    Every method once before any seed is repeated, so that a study cut short can still compare; the schedules that no
    verdict is about come last.

    Args:
        config: The composed ``conf/reproduce.yaml``.

    Returns:
        The jobs; experiments take turns.

    Raises:
        ValueError: If ``only`` names an experiment that is not there, or ``seeds`` is not a positive integer.
    """
    names = chosen(config)
    if config.seeds is not None and (not isinstance(config.seeds, int) or config.seeds < 1):
        raise ValueError(f"seeds must be an integer >= 1, or null, got {config.seeds!r}.")
    rounds = {name: list(_rounds(name, config)) for name in names}
    longest = max(map(len, rounds.values()))
    return [job for turn in range(longest) for jobs in rounds.values() for job in (jobs[turn : turn + 1] or [[]])[0]]


def chosen(config: DictConfig) -> list[str]:
    """Return the names of the experiments that ``only`` leaves, in the order of the study.

    Raises:
        ValueError: If there is no experiment of a name.
    """
    known = list(config.experiments)
    if config.only is None:
        return known
    only = list(config.only) if isinstance(config.only, ListConfig) else [config.only]
    if unknown := [name for name in only if name not in known]:
        raise ValueError(
            f"only names {', '.join(map(str, unknown))}, which is no experiment. There are {', '.join(known)}."
        )
    if not only:
        raise ValueError(f"only is an empty list. Name one or more of {', '.join(known)}, or leave it out.")
    return [name for name in known if name in only]


def _rounds(name: str, config: DictConfig) -> Iterator[list[Job]]:
    experiment = config.experiments[name]
    if config.quick:
        for seed in range(config.seeds or 1):
            yield [_job(name, method, QUICK, seed, experiment.quick, config) for method in experiment.methods]
        return
    first, *others = experiment.schedules
    rounds = [(first, seed) for seed in range(config.seeds or experiment.seeds)] + [(other, 0) for other in others]
    for schedule, seed in rounds:
        overrides = experiment.schedules[schedule].overrides
        yield [_job(name, method, schedule, seed, overrides, config) for method in experiment.methods]


def _job(name: str, method: str, schedule: str, seed: int, overrides: Sequence[str], config: DictConfig) -> Job:
    own: Any = config.experiments[name].methods[method].overrides
    out = os.path.abspath(config.out)  # without "..", as Hydra has it
    folder = Path(out, "runs", name, schedule, method, f"seed{seed}")
    return Job(name, method, schedule, seed, (*own, *overrides), folder)
