"""Which runs a study has, in which order, and which commands repeat them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from mm_lightning.reproduce import runner
from mm_lightning.reproduce.plan import Job, chosen, jobs_of
from mm_lightning.train import CONF

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: hydra.compose("reproduce", [f"out={tmp_path}", *overrides])


def test_default_study_has_every_method_seed_and_schedule(compose: Compose) -> None:
    jobs = jobs_of(compose())
    counted = Counter((job.experiment, job.schedule) for job in jobs)
    assert counted == {
        **{("spiral", "default"): 15, ("spiral", "reference"): 3},  # 3 methods, 5 seeds and 1
        **{("mnist_bottleneck", "default"): 9, ("mnist_bottleneck", "reference"): 3},  # 3 methods, 3 seeds and 1
        **{("mnist_flatness", "default"): 18, ("mnist_flatness", "reference"): 6},  # 6 methods, 3 seeds and 1
    }
    assert len({job.folder for job in jobs}) == 54
    assert {job.seed for job in jobs if job.schedule == "reference"} == {0}


def test_first_seed_comes_first_everywhere(compose: Compose) -> None:
    seeds = [job.seed for job in jobs_of(compose()) if job.schedule == "default"]
    assert seeds[:12] == [0] * 12
    assert seeds == sorted(seeds)


def test_only_seeds_and_quick(compose: Compose) -> None:
    jobs = jobs_of(compose("only=spiral", "seeds=2"))
    assert Counter((job.schedule, job.seed) for job in jobs) == {
        ("default", 0): 3,
        ("default", 1): 3,
        ("reference", 0): 3,
    }
    jobs = jobs_of(compose("only=[mnist_flatness,spiral]", "quick=true"))
    assert Counter((job.experiment, job.schedule) for job in jobs) == {
        ("spiral", "quick"): 3,
        ("mnist_flatness", "quick"): 6,
    }
    assert chosen(compose("only=[mnist_flatness,spiral]")) == ["spiral", "mnist_flatness"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "only=spirals",
            "only names spirals, which is no experiment. There are spiral, mnist_bottleneck, mnist_flatness",
        ),
        ("only=[]", "only is an empty list. Name one or more of spiral"),
        ("seeds=0", "seeds must be an integer >= 1, or null, got 0"),
        ("seeds=two", "seeds must be an integer >= 1, or null, got 'two'"),
    ],
)
def test_mistakes_are_named(override: str, message: str, compose: Compose) -> None:
    with pytest.raises(ValueError, match=message):
        jobs_of(compose(override))


def test_command_can_be_typed() -> None:
    job = Job(
        "mnist_flatness", "manifold_before", "default", 2, ("mixup=manifold", "model.blocks.mix_before=[3]"), Path("/x")
    )
    assert job.command == (
        "python -m mm_lightning.train +experiment=mnist_flatness mixup=manifold 'model.blocks.mix_before=[3]' seed=2"
    )


def test_every_run_composes(compose: Compose) -> None:
    for quick in ("false", "true"):
        for job in jobs_of(compose(f"quick={quick}", "seeds=1")):
            config = runner.composed(job)
            assert (config["seed"], config["name"], config["run_dir"]) == (0, job.experiment, str(job.folder))


def test_methods_of_an_experiment_share_the_schedule(compose: Compose) -> None:
    seen: dict[tuple[str, str], set[tuple[int, str]]] = {}
    for job in jobs_of(compose("seeds=1")):
        config = runner.composed(job)
        schedule = config["max_epochs"], str(config["scheduler"]) + str(config["optimizer"]["lr"])
        seen.setdefault((job.experiment, job.schedule), set()).add(schedule)
    assert all(len(schedules) == 1 for schedules in seen.values())
    assert {key: schedules.pop()[0] for key, schedules in seen.items()} == {
        **{("spiral", "default"): 16, ("mnist_bottleneck", "default"): 14, ("mnist_flatness", "default"): 6},
        **{(name, "reference"): 24 for name in ("spiral", "mnist_bottleneck", "mnist_flatness")},
    }
