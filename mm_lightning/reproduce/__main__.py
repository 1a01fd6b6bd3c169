"""The command ``python -m mm_lightning.reproduce``: train, compare, judge, report."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mm_lightning import failure, record
from mm_lightning.reproduce import runner
from mm_lightning.reproduce.collect import RULE, experiment_of
from mm_lightning.reproduce.plan import chosen, jobs_of
from mm_lightning.reproduce.report import write_report
from mm_lightning.reproduce.study import Study
from mm_lightning.reproduce.tables import claims
from mm_lightning.train import CONF


def reproduce(config: DictConfig) -> None:
    """Run a study and write its report.

    Raises:
        ValueError: If a setting does not fit.
        RuntimeError: If a run fails.
    """
    begin = time.monotonic()
    at_once = runner.num_cores() if config.jobs is None else config.jobs
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"jobs must be an integer >= 1, or null for one per core, got {at_once!r}.")
    jobs = jobs_of(config)
    runner.run_all(jobs, at_once)
    folder = Path(config.out, "report")
    folder.mkdir(parents=True, exist_ok=True)
    experiments = [
        experiment_of(name, config.experiments[name], [job for job in jobs if job.experiment == name], folder)
        for name in chosen(config)
    ]
    study = Study(
        format=1,
        quick=config.quick,
        command=" ".join(["python -m mm_lightning.reproduce", *HydraConfig.get().overrides.task]),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=_all_seconds(folder.parent / "seconds.json", time.monotonic() - begin),
        jobs=at_once,
        threads_per_job=max(1, runner.num_cores() // at_once),
        environment=record.environment(),
        experiments=experiments,
        rule=RULE,
    )
    record.write_json(folder / "metrics.json", dict(study))
    page = write_report(study, folder)
    print(_summary(study, page))


def _all_seconds(path: Path, seconds: float) -> float:
    """Add this call to those before it, which made other runs of the same study."""
    before = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0
    record.write_json(path, {"seconds": before + seconds})
    return before + seconds


def _summary(study: Study, page: Path) -> str:
    lines = []
    for experiment in study["experiments"]:
        lines.append(f"{experiment['title']} ({experiment['name']})")
        for claim in claims(experiment):
            seeds = f"better in {claim.better_in} of {claim.seeds} seeds"
            lines.append(f"  {claim.verdict:6} {claim.text}: {claim.method} against {claim.against}, {seeds}")
    if study["quick"]:
        lines.append("A quick study shows that all works; it is too small to judge the claims.")
    return "\n".join([*lines, f"Report   {page}", f"Numbers  {page.with_name('metrics.json')}"])


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="reproduce")
def _job(config: DictConfig) -> None:
    try:
        reproduce(config)
    except Exception as error:
        raise failure.JobFailed(error) from error


def main() -> None:
    """Run the command line. Exit code 0 on success, 130 after Ctrl-C, 1 otherwise."""
    sys.argv[1:] = ["quick=true" if argument == "--quick" else argument for argument in sys.argv[1:]]
    with failure.as_one_line():
        _job()


if __name__ == "__main__":
    main()
