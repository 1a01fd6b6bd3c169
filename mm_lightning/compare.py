"""Tables of finished runs side by side: ``python -m mm_lightning.compare RUN RUN ...``.

Runs that differ in nothing but the seed are one column, with mean and standard deviation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mm_lightning import failure, record
from mm_lightning.reproduce.collect import measure_of, run_of
from mm_lightning.reproduce.findings import cells
from mm_lightning.reproduce.pictures import draw_pictures
from mm_lightning.reproduce.plan import Job
from mm_lightning.reproduce.report import write_report
from mm_lightning.reproduce.runner import CONFIG, METRICS
from mm_lightning.reproduce.study import Experiment, Measure, Method, Schedule, Study
from mm_lightning.reproduce.tables import tables
from mm_lightning.train import CONF

__all__ = ["compare", "main", "markdown"]

_SCHEDULE = "runs"  # the tables have schedules; here every run is what it is
_NO_METHOD = ("seed=", "ckpt_path=", "hydra.", "trainer=", "logger=", "callbacks=")


def compare(folders: Sequence[Path]) -> list[Experiment]:
    """Collect runs by experiment, and within it by everything that was set but the seed.

    Args:
        folders: Of the runs; each holds ``metrics.json`` and ``config.yaml``.

    Returns:
        One experiment for each ``name`` in the configurations, without verdicts and pictures.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
        ValueError: If two runs of one column have the same seed, or no measure is common.
    """
    jobs = [_job(folder) for folder in folders]
    return [_experiment(name, [job for job in jobs if job.experiment == name]) for name in _unique(jobs, "experiment")]


def markdown(experiment: Experiment) -> str:
    """Write an experiment's table in Markdown: a row per measure, a column per method, ``mean ± sd``."""
    (table,) = tables(experiment)
    lines = [
        ["", *(method["title"] for method in table.methods)],
        ["---"] * (1 + len(table.methods)),
        *(
            [_heading(row.measure), *(f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells)]
            for row in table.rows
        ),
    ]
    seeds = ", ".join(f"{method['title']}: {_seeds(experiment, method['name'])}" for method in table.methods)
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"## {experiment['title']}", "", *rows, "", f"Seeds: {seeds}."])


def main() -> None:
    """Run the command line. Exit code 0 on success, 1 otherwise."""
    parser = argparse.ArgumentParser("python -m mm_lightning.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="also write index.html, with pictures, there")
    arguments = parser.parse_args()
    with failure.as_one_line():
        experiments = compare(arguments.runs)
        print("\n\n".join(map(markdown, experiments)))
        if arguments.report:
            print(f"\nReport   {_report(experiments, arguments.runs, arguments.report)}")


def _job(folder: Path) -> Job:
    for file in (METRICS, CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}, so no finished run. Name folders of finished runs.")
    config, metrics = OmegaConf.load(folder / CONFIG), json.loads((folder / METRICS).read_text(encoding="utf-8"))
    overrides = [word for word in metrics.get("overrides") or [] if not word.startswith((*_NO_METHOD, "+experiment="))]
    method = " ".join(overrides) or ("as it is" if "overrides" in metrics else folder.parent.name)
    return Job(config.name, method, _SCHEDULE, metrics["seed"], tuple(overrides), folder)


def _experiment(name: str, jobs: Sequence[Job]) -> Experiment:
    for job in jobs:
        twins = [str(other.folder) for other in jobs if (other.method, other.seed) == (job.method, job.seed)]
        if len(twins) > 1:
            raise ValueError(f"{' and '.join(twins)} are both {name}, {job.method}, seed {job.seed}. Name one of them.")
    runs = [run_of(job) for job in jobs]
    keys = [key for key in runs[0]["metrics"] if all(key in run["metrics"] for run in runs)]
    known = _known_measures()
    order = [key for key in known if key in keys]
    measures = [known[key] for key in order] + [_unknown(key) for key in keys if _is_result(key) and key not in known]
    if not measures:
        raise ValueError(f"The runs of {name} have no test/... number in common.")
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    return Experiment(
        name=name,
        title=name,
        text="Runs side by side; columns differ in what was set, dots in the seed.",
        methods=[Method(name=method, title=method) for method in _unique(jobs, "method")],
        schedules=[Schedule(name=_SCHEDULE, text="as configured in each run", seconds_per_run=seconds)],
        measures=measures,
        runs=runs,
        cells=cells(runs, measures),
        verdicts=[],
        pictures=[],
        players=[],
    )


def _report(experiments: Sequence[Experiment], folders: Sequence[Path], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_job(one) for one in folders]
    for experiment in experiments:
        about: Any = OmegaConf.create(
            {
                "methods": {method["name"]: {"title": method["title"]} for method in experiment["methods"]},
                "schedules": {_SCHEDULE: {"text": "as configured in each run"}},
            }
        )
        own = [job for job in jobs if job.experiment == experiment["name"]]
        experiment["pictures"], experiment["players"] = draw_pictures(about, own, folder)
    study = Study(
        format=1,
        quick=False,
        command=f"python -m mm_lightning.compare {' '.join(map(str, folders))}",
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=sum(run["seconds"] for experiment in experiments for run in experiment["runs"]),
        jobs=1,
        threads_per_job=0,
        environment=record.environment(),
        experiments=list(experiments),
    )
    record.write_json(folder / METRICS, dict(study))
    return write_report(study, folder)


def _known_measures() -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for path in sorted((CONF / "reproduction").glob("*.yaml")):
        (about,) = OmegaConf.load(path).values()
        for key, measure in about.measures.items():
            found.setdefault(key, measure_of(key, measure))
    return found


def _unknown(key: str) -> Measure:
    return Measure(key=key, title=key, unit="", factor=1, digits=4, better=None, meaning="")


def _is_result(key: str) -> bool:
    return key.startswith("test/")


def _heading(measure: Measure) -> str:
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[measure["better"]]
    return f"{measure['title']}{', ' + measure['unit'] if measure['unit'] else ''}{arrow}"


def _seeds(experiment: Experiment, method: str) -> str:
    return " ".join(str(run["seed"]) for run in experiment["runs"] if run["method"] == method)


def _unique(jobs: Sequence[Job], attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(job, attribute) for job in jobs))


if __name__ == "__main__":
    main()
