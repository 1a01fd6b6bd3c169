"""The command ``python -m mm_lightning.reproduce``: train, compare, judge, report."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from mm_lightning import failure
from mm_lightning.reproduce import runner
from mm_lightning.reproduce.plan import jobs_of
from mm_lightning.train import CONF


def reproduce(config: DictConfig) -> None:
    """Run a study and write its report."""
    jobs = jobs_of(config)
    at_once = runner.num_cores() if config.jobs is None else config.jobs
    runner.run_all(jobs, at_once)


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
