"""The command ``python -m mm_lightning.reproduce``: train, compare, judge, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mm_lightning.command.run_folder import keep_folder
from mm_lightning.files import write_json
from mm_lightning.study import runner
from mm_lightning.study.collect import experiment_of, study_of
from mm_lightning.study.forked import Forks
from mm_lightning.study.form import Experiment, Study
from mm_lightning.study.jobs import Job, chosen, jobs_of
from mm_lightning.study.report import write_report
from mm_lightning.study.tables import claims

__all__ = ["reproduce"]

_MOST_AT_ONCE = 8  # by default: a run takes up to 1 GB


def reproduce(config: DictConfig) -> None:
    """Run a study and write its report.

    Raises:
        ValueError: If a setting does not fit.
        RuntimeError: If a run fails.
    """
    at_once = min(runner.num_cores(), _MOST_AT_ONCE) if config.jobs is None else config.jobs
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"jobs must be an integer >= 1, or null for one per core, got {at_once!r}.")
    if not isinstance(config.quick, bool):
        raise ValueError(f"quick must be true or false, got {config.quick!r}.")
    jobs = [_with_config_dir(job) for job in jobs_of(config)]
    keep_folder()
    forks = Forks.of_this_machine()
    with nullcontext() if forks is None else closing(forks):
        runner.run_all(jobs, at_once, forks)
    folder = Path(config.out, "report")
    shutil.rmtree(folder, ignore_errors=True)  # pictures of an earlier, larger or smaller study
    folder.mkdir(parents=True)
    names = chosen(config)
    of = {name: [job for job in jobs if job.experiment == name] for name in names}
    experiments = [experiment_of(name, config.experiments[name], of[name], folder) for name in names]
    command = ["python", "-m", "mm_lightning.reproduce", *HydraConfig.get().overrides.task]
    study = study_of(command, experiments, jobs, (at_once, runner.threads_of(at_once)))
    write_json(folder / "metrics.json", dict(study))
    page = write_report(study, folder)
    print(_summary(study, page))


def _with_config_dir(job: Job) -> Job:
    """Let a run find what this command found in the folder of ``--config-dir``."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [os.path.abspath(source.path) for source in sources if source.provider == "command-line"]
    return replace(job, overrides=(*job.overrides, *(f'hydra.searchpath=["file://{folder}"]' for folder in folders)))


def _summary(study: Study, page: Path) -> str:
    lines = []
    for experiment in study["experiments"]:
        lines.append(f"{experiment['title']} ({experiment['name']})")
        if study["quick"]:
            networks, _, _ = experiment["text"].partition(". ")  # its first sentence names them
            lines += [f"  {networks.rstrip('.')}.", *_accuracies(experiment)]
        for claim in claims(experiment):
            difference = f"{claim.difference} {claim.unit}".rstrip()
            lines.append(f"  {claim.verdict}: {claim.text}, {claim.method} against {claim.against}, {difference}")
    if study["quick"]:
        lines.append(
            "A quick study shows that all works, on small networks and few data; it is too small to judge the claims."
        )
    return "\n".join([*lines, f"Report   {page}", f"Numbers  {page.with_name('metrics.json')}"])


def _accuracies(experiment: Experiment) -> Iterator[str]:
    """A line with what each method has learnt, where that is measured."""
    titles = {method["name"]: method["title"] for method in experiment["methods"]}
    means = {cell["method"]: cell["mean"] for cell in experiment["cells"] if cell["key"] == "test/acc"}
    shown = [f"{titles[method]} {100 * mean:.1f} %" for method, mean in means.items() if mean is not None]
    if shown:
        yield f"  test accuracy: {', '.join(shown)}"
