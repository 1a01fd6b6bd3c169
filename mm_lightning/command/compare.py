"""Tables of finished runs side by side: ``python -m mm_lightning.compare RUN RUN ...``.

Runs that differ in nothing but the seed are one column, with mean and standard deviation; columns are held against the
first one, seed by seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mm_lightning.command import failure
from mm_lightning.command.configuration import CONF
from mm_lightning.command.line import LineParser
from mm_lightning.command.metric_names import direction_of
from mm_lightning.files import write_json
from mm_lightning.study.collect import measure_of, run_of, study_of
from mm_lightning.study.form import Experiment, Measure, Method, Run, Schedule, Verdict
from mm_lightning.study.jobs import Job
from mm_lightning.study.markdown import markdown, unpaired
from mm_lightning.study.runner import CONFIG, METRICS, leaves
from mm_lightning.study.verdicts import cells, verdict

__all__ = ["compare", "finished_runs", "main", "markdown"]

_SCHEDULE = "configured"  # the tables have schedules; here every run is what it is
_WATCHING = (
    "seed",
    "run_dir",
    "ckpt_path",
    "logger",
    "diagnostics",
    "callbacks",
    "objective",
)  # settings that change no result
_NO_METHOD = (
    "seed=",
    "+sweep=",
    "objective=",
    "ckpt_path=",
    "hydra.",
    "logger",
    "diagnostics",
    "callbacks",
    "+experiment=",
    "data.download=",
)
_FETCHING = ("data.download",)  # the first of several runs may have fetched the data
_MOST_SHOWN = 3  # settings in a column's title
_ABOUT = """\
Print tables of finished runs side by side: a row for each measure, a column for each setting.
Runs that differ in nothing but the seed are one column, with mean and standard deviation. A second table holds the
columns against the first one: the mean difference of runs with the same seed, its 95 % interval, and what it says.
mm-compare is short for python -m mm_lightning.compare."""
_EXAMPLES = """\
examples:
  mm-compare outputs/mnist_bottleneck/*
  mm-compare multirun/mnist_bottleneck/2026-01-31_12-00-00-000000 --report side_by_side

Every RUN is a folder of a run or of a sweep, and shells complete folders by themselves."""


def compare(folders: Sequence[Path], config_dir: Path | None = None) -> list[Experiment]:
    """Collect runs by experiment, and within it by everything that was set but the seed.

    Args:
        folders: Of the runs; each holds ``metrics.json`` and ``config.yaml``.
        config_dir: Folder with ``reproduction/EXPERIMENT.yaml`` for experiments that ``conf/`` does not describe.

    Returns:
        One experiment for each ``name`` in the configurations, without pictures; verdicts hold each column against the
        first.

    Raises:
        FileNotFoundError: If a folder holds no finished run, or there is no ``config_dir``.
        ValueError: If two runs of one column have the same seed, or none has a number of a test.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise FileNotFoundError(f"config_dir {str(config_dir)!r} is not a folder. Name one, or leave it out.")
    known = [CONF] if config_dir is None else [CONF, config_dir]
    jobs = [_job(folder) for folder in folders]
    names = _unique(jobs, "experiment")
    return [_experiment(name, [job for job in jobs if job.experiment == name], known) for name in names]


def main() -> None:
    """Run the command line. Exit code 0 on success, 1 otherwise."""
    with failure.as_one_line():
        arguments = _parser().parse_args()
        runs = finished_runs(arguments.runs)
        experiments = compare(runs, arguments.config_dir)
        print("\n\n".join(map(markdown, experiments)))
        if arguments.report:
            print(f"\nReport   {_report(experiments, runs, arguments.report)}")


def finished_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the runs in some folders: a run itself, or all finished ones below, as in the folder of a sweep.

    Runs are in the order of their numbers, ``2_...`` before ``10_...``. Unfinished ones are named on stderr.

    Raises:
        FileNotFoundError: If there is no finished run in one of the folders.
    """
    runs: list[Path] = []
    for folder in folders:
        below = [] if (folder / METRICS).is_file() else sorted(folder.rglob(CONFIG), key=_numbered)
        inner = [path.parent for path in below if path.parent.name != ".hydra"]
        if unfinished := [run for run in inner if not (run / METRICS).is_file()]:
            print(f"Left out, not finished: {', '.join(map(str, unfinished))}", file=sys.stderr)
        runs += [run for run in inner if run not in unfinished] or [folder]  # which is refused by its name
    return list(dict.fromkeys(runs))


def _numbered(path: Path) -> list[tuple[int, str]]:
    parts = (part.partition("_") for part in path.parts)
    return [(int(number), rest) if number.isdecimal() else (-1, number + rest) for number, _, rest in parts]


def _parser() -> LineParser:
    usage = "mm-compare [options] RUN [RUN ...]"
    parser = LineParser(prog="mm-compare", usage=usage, description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run, or of many")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="also write index.html, with pictures, there")
    parser.add_config_dir("of your own reproduction/EXPERIMENT.yaml: its measures")
    return parser


def _job(folder: Path) -> Job:
    """Describe a finished run; its method is a hash of all that was set but the seed, paths and what only watches."""
    for file in (METRICS, CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}, so no finished run. Name folders of finished runs.")
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    settings = {
        key: value
        for key, value in leaves(config).items()
        if key.split(".")[0] not in _WATCHING
        and key not in _FETCHING
        and str(config["run_dir"]) not in str(value)
        and not (key.split(".")[-1] == "seed" and value == config["seed"])
    }
    method = json.dumps(settings, sort_keys=True)
    typed = metrics.get("overrides") or []
    overrides = [word for word in typed if not word.startswith(_NO_METHOD)]
    if "method" in metrics and not any(word.startswith("mixup=") for word in overrides):  # the default is a way, too
        overrides.insert(0, f"mixup={metrics['method']}")
    base = tuple(word for word in typed if word.startswith("+experiment="))
    return Job(config["name"], method, _SCHEDULE, metrics["seed"], tuple(overrides), folder, base)


def _titles(jobs: Sequence[Job]) -> dict[str, str]:
    """Name each method by what not all have overridden, or where that does not tell, by the settings that differ."""
    if len({job.method for job in jobs}) == 1:
        return {jobs[0].method: " ".join(jobs[0].overrides) or "as configured"}
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    methods = {job.method: " ".join(word for word in job.overrides if word not in shared) for job in jobs}
    if all(methods.values()) and len(set(methods.values())) == len(methods):
        return methods
    settings = {method: json.loads(method) for method in methods}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    differing = [key for key in keys if len({str(one.get(key)) for one in settings.values()}) > 1]
    return {
        method: " ".join(f"{key}={one.get(key)}" for key in differing[:_MOST_SHOWN]) for method, one in settings.items()
    }


def _experiment(name: str, jobs: Sequence[Job], described_in: Sequence[Path]) -> Experiment:
    titles = _titles(jobs)
    for job in jobs:
        twins = [str(other.folder) for other in jobs if (other.method, other.seed) == (job.method, job.seed)]
        if len(twins) > 1:
            raise ValueError(
                f"{' and '.join(twins)} are the same {name} with seed {job.seed}, {titles[job.method]}. Name only one."
            )
    runs = [run_of(job) for job in jobs]
    known = {measure["key"]: measure for measure in _known_measures(name, described_in)}
    keys = list(dict.fromkeys(key for run in runs for key in run["metrics"]))
    measures = [known[key] for key in known if key in keys]
    measures += [_unknown(key) for key in keys if key.startswith("test/") and key not in known]
    if not measures:
        raise ValueError(f"The runs of {name} have no test/... number. Let them be tested.")
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    return Experiment(
        name=name,
        title=name,
        text="Runs side by side; columns differ in what was set, dots in the seed.",
        methods=[Method(name=method, title=title) for method, title in titles.items()],
        schedules=[Schedule(name=_SCHEDULE, text="as configured in each run", seconds_per_run=seconds)],
        measures=measures,
        runs=runs,
        cells=cells(runs, measures),
        verdicts=_verdicts(runs, measures, list(titles)),
        pictures=[],
        players=[],
    )


def _verdicts(runs: Sequence[Run], measures: Sequence[Measure], methods: Sequence[str]) -> list[Verdict]:
    """Hold each method that shares a seed with the first one against it, in each measure with a direction."""
    seeds = {method: {run["seed"] for run in runs if run["method"] == method} for method in methods}
    return [
        verdict(runs, measure, method, methods[0], [_SCHEDULE])
        for measure in measures
        if measure["better"]
        for method in methods[1:]
        if seeds[method] & seeds[methods[0]]
    ]


def _report(experiments: Sequence[Experiment], folders: Sequence[Path], folder: Path) -> Path:
    from mm_lightning.study.pictures import draw_pictures  # only reports need what they draw and write with
    from mm_lightning.study.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_job(one) for one in folders]
    for experiment in experiments:
        titles = {method["name"]: {"title": method["title"]} for method in experiment["methods"]}
        experiment["text"] = " ".join([experiment["text"], *unpaired(experiment)])
        own = [job for job in jobs if job.experiment == experiment["name"]]
        experiment["pictures"], experiment["players"] = draw_pictures({"methods": titles}, own, folder)
    command = ["python", "-m", "mm_lightning.compare", *map(str, folders), "--report", str(folder)]
    study = study_of(command, experiments, jobs, at_once=None)
    study["title"] = "Runs side by side"
    write_json(folder / METRICS, dict(study))
    return write_report(study, folder)


def _known_measures(experiment: str, described_in: Sequence[Path]) -> list[Measure]:
    """Return the measures that ``reproduction/`` in the first of some folders describes for an experiment, or none."""
    paths = [path for folder in described_in if (path := folder / "reproduction" / f"{experiment}.yaml").is_file()]
    described: Any = OmegaConf.to_container(OmegaConf.load(paths[0])) if paths else {}
    own = described.get(experiment, {}).get("measures", {})
    return [measure_of(key, about) for key, about in own.items()]


def _unknown(key: str) -> Measure:
    """Describe a measure by its name alone: ``test/acc`` is better higher, ``test/loss`` lower."""
    better = {"max": "higher", "min": "lower", None: None}[direction_of(key)]
    about = {"title": key, "unit": "", "factor": 1, "digits": 4, "better": better, "meaning": ""}
    return measure_of(key, about)


def _unique(jobs: Sequence[Job], attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(job, attribute) for job in jobs))
