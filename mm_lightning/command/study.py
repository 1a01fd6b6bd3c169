"""The command ``python -m mm_lightning.study``: does manifold mixup help this model on these data?"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mm_lightning.command.checks import check_config, check_devices
from mm_lightning.command.metric_names import direction_of, found_metric, is_of_regression, unfit_split
from mm_lightning.command.objective import check_may_choose
from mm_lightning.command.run_folder import keep_folder
from mm_lightning.files import write_json
from mm_lightning.study import runner
from mm_lightning.study.answer import Answer, answer
from mm_lightning.study.budget import seconds_of
from mm_lightning.study.candidates import methods_of
from mm_lightning.study.collect import measure_of, run_of, study_of
from mm_lightning.study.course import FIRST_SEARCH_SEED, Course, Objective, run_course
from mm_lightning.study.curves import picture_of_curves
from mm_lightning.study.form import Experiment, Measure, Method, Picture, Schedule
from mm_lightning.study.markdown import markdown
from mm_lightning.study.report import write_report
from mm_lightning.study.statistics import MARGINS
from mm_lightning.study.study_runs import StudyRuns
from mm_lightning.study.verdicts import cells, verdict

__all__ = ["measures_of", "objective_of", "searched", "study", "words_of_runs"]

_OWN = ("budget", "out", "seeds", "jobs", "metric", "only", "methods")
_REFUSED = {
    "mixup": "the study chooses how to mix: only=[...] and methods say which ways",
    "alpha": "the study chooses it: methods.NAME.values say which ones",
    "seed": "the study has seeds=N of its own",
    "run_dir": "out=FOLDER is the study's",
    "ckpt_path": "every run begins anew",
    "objective": "metric=KEY is the study's",
    "callbacks": "the study's runs have callbacks of their own; one more is +callbacks.NAME=...",
}
_SPLIT = "data.data_seed=null"  # one of its own for each seed
_MOST_AT_ONCE = 8  # by default
_ACC = "val/evaluation/acc"
_GROUP = "test/evaluation"
_VALIDATION = re.compile(r"(?<![A-Za-z])([Ee]?[Vv]al(id(ation)?)?|[Dd]ev)(?![a-z])")  # valLoss, not interval
_SCALED = "after a temperature that was fitted to the validation data (Guo et al. 2017)"
_OF_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "acc": {"title": "accuracy", "unit": "%", "factor": 100, "digits": 2, "better": "higher", "meaning": ""},
    "nll": {"title": "NLL", "unit": "nats", "meaning": "Mean negative log-likelihood."},
    "ece": {"title": "ECE", "meaning": "Expected calibration error, 15 bins."},
    "brier": {"title": "Brier score", "meaning": "Mean squared distance of the probabilities to the class, in [0, 2]."},
    "nll_scaled": {"title": "NLL after temperature", "unit": "nats", "margin": 0.02, "meaning": f"NLL {_SCALED}."},
    "ece_scaled": {"title": "ECE after temperature", "margin": 0.01, "meaning": f"ECE {_SCALED}."},
    "brier_scaled": {"title": "Brier after temperature", "meaning": f"Brier score {_SCALED}."},
}
_DEFAULTS = {"unit": "", "factor": 1, "digits": 4, "better": "lower", "meaning": ""}


def study(config: DictConfig) -> None:
    """Run a study, or what is missing of it, and write its page.

    Raises:
        ValueError: If a setting does not fit, the folder holds another study, or the budget is too small.
        RuntimeError: If the run without mixing fails.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("mm-study makes its own runs, and is no sweep. Leave out -m and --multirun.")
    budget = seconds_of(config.budget)
    _check_seeds(config.seeds)
    typed = list(HydraConfig.get().overrides.task)
    words = words_of_runs(typed, "data_seed" in (config.data or {}))
    words += searched(HydraConfig.get().runtime.config_sources)
    described: Any = OmegaConf.to_container(config.methods, resolve=True)
    only = [config.only] if isinstance(config.only, str) else None if config.only is None else list(config.only)
    methods = methods_of(described, only)
    check_config(config)
    check_devices(config)
    check_may_choose(config.data, "mm-study chooses strengths by validation")
    launcher = [
        word for word in HydraConfig.get().overrides.hydra if word.startswith(("hydra/launcher", "hydra.launcher"))
    ]
    devices, at_once = _places(config, launcher)
    folder = Path(os.path.abspath(config.out))
    settings = {
        "runs": sorted(words),
        "methods": described,
        "only": only,
        "metric": config.metric,
    }
    keep_folder()
    with StudyRuns(folder, words, settings, budget, at_once, devices=devices, launcher=launcher) as runs:
        course = run_course(
            methods,
            config.seeds,
            runs,
            lambda metrics: objective_of(config.metric, metrics),
            runs.plan,
            runs.keep_plan,
            runs.may_grow,
        )
    found = answer(_experiment(course, runs, words), course, words)
    _write(found, runs, folder, ["python", "-m", "mm_lightning.study", *typed])


def words_of_runs(typed: Sequence[str], has_data_seed: bool) -> list[str]:
    """Return what is typed for the runs, and what every run has besides.

    Args:
        typed: What is typed for the study.
        has_data_seed: Whether the data have a ``data_seed``. It becomes null, if nothing else is typed: a split of its
            own for each seed, the same for all methods.

    Raises:
        ValueError: If something is typed that the study says itself.
    """
    keys = {word: word.lstrip("+~").split("=")[0].split("@")[0] for word in typed}
    for word, key in keys.items():
        if (top := re.split(r"[./]", key)[0]) in _REFUSED and not (top == "callbacks" and "." in key):
            raise ValueError(f"{word!r} cannot be said to mm-study: {_REFUSED[top]}.")
    words = [word for word, key in keys.items() if key.split(".")[0] not in _OWN]
    return [*words, _SPLIT] if has_data_seed and "data.data_seed" not in keys.values() else words


def searched(sources: Sequence[Any]) -> list[str]:
    """Return the override by which runs find the options that the study has from ``--config-dir`` or a search path."""
    places = [
        f"file://{os.path.abspath(source.path)}" if source.schema == "file" else f"{source.schema}://{source.path}"
        for source in sources
        if source.provider in ("command-line", "hydra.searchpath in command-line")
    ]
    quoted = ",".join(f'"{place}"' for place in places)
    return [f"hydra.searchpath=[{quoted}]"] if places else []


def _check_seeds(seeds: Any) -> None:
    if not isinstance(seeds, int) or not 2 <= seeds <= FIRST_SEARCH_SEED:  # beyond are those that choose strengths
        raise ValueError(f"seeds must be an integer in [2, {FIRST_SEARCH_SEED}], got {seeds!r}. 10 is the default.")


def _places(config: DictConfig, launcher: Sequence[str]) -> tuple[list[str], int]:
    """Return the GPUs that runs are spread over, and how many runs are made at a time."""
    on_gpu = config.trainer.get("accelerator") in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    each = config.trainer.get("devices", 1)
    devices: list[str] = []
    if on_gpu and not launcher and isinstance(each, int) and each > 0:
        numbers = [str(number) for number in range(torch.cuda.device_count())]
        devices = [",".join(numbers[place : place + each]) for place in range(0, len(numbers) - each + 1, each)]
    most = _MOST_AT_ONCE if launcher else min(runner.num_cores(), _MOST_AT_ONCE)
    at_once = (len(devices) or (1 if on_gpu else most)) if config.jobs is None else config.jobs
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"jobs must be an integer >= 1, or null for what the machine has, got {at_once!r}.")
    return [devices[place % len(devices)] for place in range(at_once)] if devices else [], at_once


def objective_of(metric: str, metrics: Mapping[str, float]) -> Objective:
    """Find what strengths are chosen by.

    Args:
        metric: A key, or ``"auto"``.
        metrics: What a run has measured.

    Raises:
        ValueError: If it is not there, is of test or training data, or its name does not tell which way is better.
    """
    if split := unfit_split(metric):
        raise ValueError(
            f"metric {metric!r} is of {split} data, which choose nothing: methods are fitted to one and compared by "
            "the other. Name one of a validation, or leave it out."
        )
    metrics = _meant(metrics)
    key = (_ACC if _ACC in metrics else found_metric(metrics)) if metric == "auto" else metric
    if key is None or key not in metrics:
        wanted = "a metric of a validation, such as 'val/acc' or 'val_loss'," if metric == "auto" else repr(metric)
        raise ValueError(
            f"mm-study chooses by validation, and {wanted} is not logged. Logged are {', '.join(sorted(metrics))}. "
            "Log one, or name it with metric=KEY."
        )
    better = direction_of(key)
    if better is None:
        raise ValueError(
            f"metric {key!r} does not tell whether more or less of it is better. Log it under a name with acc, loss, "
            "error or the like in it."
        )
    return Objective(key, "higher" if better == "max" else "lower")


def measures_of(objective: Objective, metrics: Mapping[str, float]) -> list[Measure]:
    """Return what methods are compared by; first what strengths were chosen by, on test data where there are some."""
    metrics = _meant(metrics)
    counterpart = _VALIDATION.sub("test", objective.key, count=1)
    primary = counterpart if counterpart in metrics else objective.key
    keys = {primary: _described(primary, objective.better, metrics[primary])}
    if f"{_GROUP}/acc" in metrics:
        keys |= {f"{_GROUP}/{name}": {**_DEFAULTS, "digits": 3, **about} for name, about in _OF_CLASSIFIERS.items()}
    else:
        keys |= {
            key: _described(key, "higher" if better == "max" else "lower", value)
            for key, value in metrics.items()
            if key.lower().startswith("test") and (better := direction_of(key)) and key != primary
        }
    return [measure_of(key, about) for key, about in keys.items() if key in metrics]


def _meant(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Leave out what was measured of a regression as if of a classifier: its batches may have integers as well."""
    is_kept = not is_of_regression(metrics)
    return {key: value for key, value in metrics.items() if is_kept or "/evaluation/" not in key}


def _described(key: str, better: str, value: float) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if key.rpartition("/")[2].rpartition("_")[2] in ("acc", "accuracy"):
        is_share = not value > 1  # else it is a module's own per cent
        factor, margin = (100, MARGINS["acc"]) if is_share else (1, 100 * MARGINS["acc"])
        shown = {"unit": "%", "factor": factor, "digits": 2, "margin": margin}
    return {**_DEFAULTS, **shown, "title": key, "better": better}


def _experiment(course: Course, runs: StudyRuns, words: Sequence[str]) -> Experiment:
    results = {(one, seed): metrics for (one, seed), metrics in course.results.items() if one in course.chosen}
    # of all runs: a temperature is not fitted in each
    measures = measures_of(course.objective, {key: value for one in results.values() for key, value in one.items()})
    made = [run_of(runs.job(one, seed)) for one, seed in results]
    names = [candidate.method.name for candidate in course.chosen]
    seconds = sum(run["seconds"] for run in made) / len(made)
    text = f"{made[0]['epochs']} epochs a run; the last weights are tested."
    return Experiment(
        name="study",
        title="Test results" if measures[0]["key"].lower().startswith("test") else "Validation results",
        text=_text(course, words),
        methods=[Method(name=candidate.method.name, title=candidate.title) for candidate in course.chosen],
        schedules=[Schedule(name="configured", text=text, seconds_per_run=seconds)],
        measures=measures,
        runs=made,
        cells=cells(made, measures),
        verdicts=[verdict(made, measure, name, names[0], ["configured"]) for measure in measures for name in names[1:]],
        pictures=[],
        players=[],
    )


def _text(course: Course, words: Sequence[str]) -> str:
    of = "first weights, order and split of the data" if _SPLIT in words else "first weights and order of the data"
    parts = [
        f"Every method has the same model, data, epochs and seeds ({', '.join(map(str, course.seeds))}); "
        f"a seed is of {of}."
    ]
    searched = [candidate for candidate in course.chosen if candidate in course.searched]
    if searched:
        parts.append(
            f"Strengths were chosen by {course.objective.key} of {course.plan.search_seeds} other seeds, half of them "
            "for those that successive halving dropped: "
            + "; ".join(f"{one.title} of {', '.join(map(str, one.method.values))}" for one in searched)
            + "."
        )
    elif any(len(candidate.method.values) > 1 for candidate in course.chosen):
        parts.append("The budget allowed no search for strengths: each method has its usual one.")
    return " ".join(parts)


def _write(found: Answer, runs: StudyRuns, folder: Path, command: list[str]) -> None:
    jobs = [runs.job(candidate, seed) for candidate, seed in found.course.results]
    report = folder / "report"
    report.mkdir(exist_ok=True)
    picture = _curves(found.course, runs, report)
    found.experiment["pictures"] = [picture] if picture else []
    content = study_of(command, [found.experiment], jobs, (runs.at_once, runner.threads_of(runs.at_once)))
    content["title"] = found.sentences[0]
    content["answer"] = found.sentences[1:]
    content["winner"] = found.command
    write_json(report / "metrics.json", dict(content))
    page = write_report(content, report)
    print("\n" + markdown(found.experiment))
    print("\n" + "\n".join(found.sentences))
    print(f"\nTrain it  {found.command}\nPage      {page}\nNumbers   {page.with_name('metrics.json')}")


def _curves(course: Course, runs: StudyRuns, folder: Path) -> Picture | None:
    """Draw what strengths were chosen by, or what the module itself logs, if that is measured at the end alone."""
    points = {one.title: [runs.curve(one, seed) for seed in course.seeds] for one in course.chosen}
    first = next(iter(points.values()))[0]
    begin = next(iter(first.values()), {})
    key = course.objective.key if course.objective.key in begin else found_metric(begin)
    if key is None:
        return None
    curves = {
        title: [{epoch: metrics.get(key) for epoch, metrics in seed.items()} for seed in seeds]
        for title, seeds in points.items()
    }
    return picture_of_curves(curves, key, folder / "curves.png")
