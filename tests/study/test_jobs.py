"""Which runs a study has, in which order, and which commands repeat them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from mm_lightning.command.configuration import CONF
from mm_lightning.study import runner
from mm_lightning.study.jobs import Job, chosen, jobs_of

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose() -> Iterator[Compose]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: hydra.compose("reproduce", ["out=/study", *overrides])


composed = cache(runner.composed)  # of a job, whose folder is the same in all tests


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
            config = composed(job)
            assert (config["seed"], config["name"], config["run_dir"]) == (0, job.experiment, str(job.folder))


def test_methods_of_an_experiment_share_the_schedule(compose: Compose) -> None:
    seen: dict[tuple[str, str], set[tuple[int, str]]] = {}
    for job in jobs_of(compose("seeds=1")):
        config = composed(job)
        schedule = config["max_epochs"], str(config["scheduler"]) + str(config["optimizer"]["lr"])
        seen.setdefault((job.experiment, job.schedule), set()).add(schedule)
    assert all(len(schedules) == 1 for schedules in seen.values())
    assert {key: schedules.pop()[0] for key, schedules in seen.items()} == {
        **{("spiral", "default"): 16, ("mnist_bottleneck", "default"): 14, ("mnist_flatness", "default"): 6},
        **{(name, "reference"): 24 for name in ("spiral", "mnist_bottleneck", "mnist_flatness")},
    }


@pytest.mark.parametrize("name", ["spiral", "mnist_bottleneck", "mnist_flatness"])
def test_what_is_written_of_an_experiment_is_what_it_does(name: str, compose: Compose) -> None:
    described = compose().experiments[name]
    for job in jobs_of(compose(f"only={name}", "seeds=1")):
        config = composed(job)
        text = described.schedules[job.schedule].text
        assert text.startswith(
            f"{config['max_epochs']} epochs, learning rate {config['optimizer']['lr']:.0e}".replace("e-0", "e-")
        )
        assert ("half a cosine" in text) == config["scheduler"]["_target_"].endswith("CosineAnnealingLR")
        assert ("divided by ten every ten epochs" in text) == config["scheduler"]["_target_"].endswith("StepLR")
        sizes = "-".join(map(str, config["model"]["blocks"]["sizes"]))
        short = {"spiral": "2-1024x7-2", "mnist_flatness": "784-1024x3-12-1024x4-10"}.get(name, sizes)
        for width, times in (("1024", 7), ("1024", 4), ("1024", 3)):
            short = short.replace(f"{width}x{times}", "-".join([width] * times))
        assert short == sizes
        assert f"batches of {config['data']['batch_size']}" in described.text.replace("\n", " ")
        if job.method.startswith("manifold"):
            assert f"Beta({config['mixup']['alpha']:.0f}, {config['mixup']['alpha']:.0f})" in described.text


@pytest.mark.parametrize("name", ["spiral", "mnist_bottleneck", "mnist_flatness"])
def test_what_is_written_of_a_quick_experiment_is_what_it_does(name: str, compose: Compose) -> None:
    described = compose().experiments[name]
    text = described.quick_text.replace("\n", " ")
    for job in jobs_of(compose(f"only={name}", "quick=true")):
        config = composed(job)
        rate = f"{config['optimizer']['lr']:.0e}".replace("e-0", "e-")
        assert config["scheduler"]["_target_"].endswith("CosineAnnealingLR")
        assert described.quick_schedule == (
            f"{config['max_epochs']} epochs, learning rate {rate} falling to zero along half a cosine"
        )
        sizes = config["model"]["blocks"]["sizes"]
        short = {"spiral": "2-256x4-2", "mnist_flatness": "784-256x3-12-256x4-10"}.get(name, "-".join(map(str, sizes)))
        for times in (4, 3):
            short = short.replace(f"256x{times}", "-".join(["256"] * times))
        assert short == "-".join(map(str, sizes))
        assert {"spiral": "2-256x4-2 ", "mnist_flatness": "784-256x3-12-256x4-10 "}.get(name, f"{short} ") in text
        assert f"batches of {config['data']['batch_size']}" in text
        rows = config["data"].get("limit") or config["data"]["num_points"]
        assert (f"{rows:,} images" in text, f"{rows:,} points each" in text) == (name != "spiral", name == "spiral")
        if job.method.startswith("manifold"):
            assert f"Beta({config['mixup']['alpha']:.0f}, {config['mixup']['alpha']:.0f})" in text
        if name == "spiral":  # hidden layers 2, 3 and 4 and the output layer, counted from 0
            assert config["model"]["blocks"]["mix_before"] == [1, 2, 3, 4]
            assert config["diagnostics"]["confidence_map"]["train_points"] == 1620  # 81 % of both classes


def test_where_is_mixed(compose: Compose) -> None:
    jobs = {
        (job.experiment, job.method): composed(job) for job in jobs_of(compose("seeds=1")) if job.schedule == "default"
    }
    mixed = {key: config["model"]["blocks"]["mix_before"] for key, config in jobs.items() if "manifold" in key[1]}
    assert mixed == {
        ("spiral", "manifold"): [4, 5, 6, 7],  # hidden layers 5, 6, 7 and the output layer, counted from 0
        ("mnist_bottleneck", "manifold"): [3, 4],  # block 2 ends in the bottleneck
        ("mnist_flatness", "manifold"): [4],  # block 3 ends in the bottleneck
        ("mnist_flatness", "manifold_before"): [3],
    }
    assert jobs["mnist_flatness", "dropout"]["model"]["blocks"]["dropout"] == [0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5]
    assert jobs["mnist_flatness", "weight_decay"]["optimizer"]["weight_decay"] == 1e-4
