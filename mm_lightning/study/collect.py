"""From the folders of finished runs to a study's results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig

from mm_lightning.study.form import Experiment, Measure, Method, Run, Schedule, Study, Verdict
from mm_lightning.study.jobs import QUICK, Job
from mm_lightning.study.runner import METRICS
from mm_lightning.study.statistics import MARGINS
from mm_lightning.study.verdicts import cells, verdict

RULE = (
    "Runs are paired by seed; ± is half the 95 % interval of the mean difference (Student's t). A method is better or "
    "worse where the interval leaves out zero. There is no difference larger than a margin where the whole interval is "
    "within it; margins are 0.5 points of accuracy, 0.02 nats of NLL and 0.01 of ECE, a choice of this project, where "
    "an experiment says no other. All else is not distinguishable, also where a run has no value or where all "
    "differences are the same but not zero. The intervals are not corrected for their number: of twenty claims without "
    "any effect, one is called better or worse. The reference schedule agrees where its seeds have the same sign; that "
    "is no verdict."
)


def study_of(
    command: Sequence[str], experiments: Sequence[Experiment], jobs: Sequence[Job], at_once: tuple[int, int] | None
) -> Study:
    """Put experiments together with what they were made with.

    Args:
        command: What was called, word by word.
        experiments: In the order of the page.
        jobs: All their runs.
        at_once: Runs at a time, and the threads of each; None if unknown.
    """
    return Study(
        format=2,
        quick=any(job.schedule == QUICK for job in jobs),
        command=shlex.join(command),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=sum(run["seconds"] for experiment in experiments for run in experiment["runs"]),
        jobs=at_once[0] if at_once else None,
        threads_per_job=at_once[1] if at_once else None,
        environment=_environment([_content(job) for job in jobs]),
        experiments=list(experiments),
        rule=RULE,
    )


def run_of(job: Job) -> Run:
    """Read what a finished run measured."""
    content = _content(job)
    return Run(
        method=job.method,
        schedule=job.schedule,
        seed=job.seed,
        command=job.command,
        seconds=content["total_seconds"],
        epochs=content["epochs"],
        metrics=content["metrics"],
    )


def experiment_of(name: str, config: DictConfig, jobs: Sequence[Job], folder: Path) -> Experiment:
    """Collect one experiment's runs, judge its claims and draw its pictures.

    Args:
        name: Of the experiment.
        config: Its part of ``conf/reproduction``.
        jobs: Its finished runs.
        folder: Of the report; pictures are put there.
    """
    runs = [run_of(job) for job in jobs]
    measures = [measure_of(str(key), measure) for key, measure in config.measures.items()]
    schedules = [_schedule(name, config, runs) for name in dict.fromkeys(run["schedule"] for run in runs)]
    from mm_lightning.study.pictures import draw_pictures  # only reports need what it draws with

    pictures, players = draw_pictures(config, jobs, folder)
    return Experiment(
        name=name,
        title=config.title,
        text=_text(config, is_quick=schedules[0]["name"] == QUICK),
        methods=[Method(name=str(method), title=about.title) for method, about in config.methods.items()],
        schedules=schedules,
        measures=measures,
        runs=[_only(run, measures) for run in runs],
        cells=cells(runs, measures),
        verdicts=[]
        if schedules[0]["name"] == QUICK
        else verdicts_of(config, measures, runs, [schedule["name"] for schedule in schedules]),
        pictures=pictures,
        players=players,
    )


def verdicts_of(
    config: DictConfig, measures: Sequence[Measure], runs: Sequence[Run], schedules: Sequence[str]
) -> list[Verdict]:
    """Judge the claims of an experiment: each judged method against all others, in each measure of a claim."""
    others = [str(method) for method in config.methods if method not in config.judged]
    return [
        verdict(runs, measure, method, against, schedules)
        for measure in measures
        if config.measures[measure["key"]].claim
        for method in config.judged
        for against in others
    ]


def _schedule(name: str, config: DictConfig, runs: Sequence[Run]) -> Schedule:
    seconds = mean(run["seconds"] for run in runs if run["schedule"] == name)
    text = _quick_schedule(config) if name == QUICK else config.schedules[name].text
    return Schedule(name=name, text=text, seconds_per_run=seconds)


def _text(config: DictConfig, is_quick: bool) -> str:
    """Say which networks and data the runs have; one's own experiment need not have a text for quick ones."""
    if not is_quick:
        return str(config.text)
    return str(config.get("quick_text") or f"Not as in what follows, but {_quick_schedule(config)} {config.text}")


def _quick_schedule(config: DictConfig) -> str:
    """Say what a quick run trains, and what sets it apart from others."""
    schedule = config.get("quick_schedule")
    return f"{f'{schedule}; ' if schedule else ''}small networks and few data: {shlex.join(config.quick)}."


def _content(job: Job) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((job.folder / METRICS).read_text(encoding="utf-8"))
    return content


def _environment(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs were made with; where they differ, all of it."""
    keys = ("python", "platform", "git_revision")
    packages = list(dict.fromkeys(name for content in contents for name in content["packages"]))
    return {
        **{key: _all(content[key] for content in contents) for key in keys},
        "processors": contents[0]["processors"],
        "packages": {name: _all(content["packages"].get(name) for content in contents) for name in packages},
    }


def _all(values: Iterable[Any]) -> str | None:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or None


def _only(run: Run, measures: Sequence[Measure]) -> Run:
    keys = [measure["key"] for measure in measures]
    return Run(**{**run, "metrics": {key: run["metrics"].get(key) for key in keys}})


def measure_of(key: str, about: Any) -> Measure:
    """Make a measure of its description in ``conf/reproduction``; its ``margin`` may be left to what it measures."""
    return Measure(
        key=key,
        title=about["title"],
        unit=about["unit"],
        factor=about["factor"],
        digits=about["digits"],
        better=about["better"],
        meaning=about["meaning"],
        margin=about.get("margin", MARGINS.get(key.rpartition("/")[2])),
    )
