"""A study's results, from folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mm_lightning.study.collect import experiment_of, measure_of, study_of
from mm_lightning.study.jobs import Job

ACC = {"title": "accuracy", "unit": "%", "factor": 100, "digits": 1, "better": "higher", "claim": True, "meaning": "m"}
SIZE = {"title": "size", "unit": "", "factor": 1, "digits": 0, "better": None, "claim": False, "meaning": "m"}
CONFIG: Any = OmegaConf.create(
    {
        "title": "Digits",
        "text": "Ten of them.",
        "methods": {"a": {"title": "A"}, "b": {"title": "B"}, "ours": {"title": "Ours"}, "ours_too": {"title": "Too"}},
        "judged": ["ours", "ours_too"],
        "schedules": {"default": {"text": "short"}, "reference": {"text": "long"}},
        "quick": ["max_epochs=1"],
        "measures": {"test/acc": ACC, "test/size": SIZE},
    }
)


def make(root: Path, method: str, acc: float, seed: int = 0, schedule: str = "default", revision: str = "r1") -> Job:
    job = Job("digits", method, schedule, seed, (f"mixup={method}",), root / schedule / method / str(seed))
    job.folder.mkdir(parents=True)
    content = {
        "metrics": {"test/acc": acc, "test/size": 3.0, "train/loss": 9.0},
        **{"total_seconds": 10.0 * (seed + 1), "epochs": 2, "python": "3.11", "platform": "here", "processors": 2},
        **{"packages": {"torch": "2.13"}, "git_revision": revision},
    }
    (job.folder / "config.yaml").write_text("{}")
    (job.folder / "metrics.json").write_text(json.dumps(content))
    return job


def test_experiment_holds_runs_cells_and_verdicts(tmp_path: Path) -> None:
    values = {"a": [0.5, 0.6], "b": [0.9, 0.1], "ours": [0.7, 0.801], "ours_too": [0.4, 0.501]}
    jobs = [make(tmp_path, name, acc, seed) for name, both in values.items() for seed, acc in enumerate(both)]
    jobs += [make(tmp_path, "a", 0.8, schedule="reference"), make(tmp_path, "ours", 0.7, schedule="reference")]
    found = experiment_of("digits", CONFIG, jobs, tmp_path)
    assert [(one["name"], one["seconds_per_run"]) for one in found["schedules"]] == [
        ("default", 15.0),
        ("reference", 10.0),
    ]
    assert found["runs"][1]["command"] == "python -m mm_lightning.train +experiment=digits mixup=a seed=1"
    assert found["runs"][1]["metrics"] == {"test/acc": 0.6, "test/size": 3.0}
    verdicts = {(one["method"], one["against"]): one for one in found["verdicts"]}
    assert {key: (one["seeds"], one["verdict"]) for key, one in verdicts.items()} == {
        ("ours", "a"): (2, "better"),
        ("ours", "b"): (2, "not distinguishable"),
        ("ours_too", "a"): (2, "worse"),
        ("ours_too", "b"): (2, "not distinguishable"),
    }
    assert {one["margin"] for one in found["verdicts"]} == {0.005}  # half a point of any accuracy
    assert verdicts["ours", "a"]["reference_agrees"] is False
    assert verdicts["ours_too", "a"]["reference_agrees"] is None
    assert {one["key"] for one in found["verdicts"]} == {"test/acc"}


def test_quick_runs_are_not_judged(tmp_path: Path) -> None:
    found = experiment_of(
        "digits", CONFIG, [make(tmp_path, name, 0.5, schedule="quick") for name in ("a", "ours")], tmp_path
    )
    assert found["verdicts"] == []
    assert "max_epochs=1" in found["schedules"][0]["text"]


def test_quick_experiment_says_what_it_trains(tmp_path: Path) -> None:
    jobs = [make(tmp_path, name, 0.5, schedule="quick") for name in ("a", "ours")]
    own = {"quick": ["max_epochs=1", "x=[1,2]"], "quick_text": "Two digits.", "quick_schedule": "1 epoch"}
    quick: Any = OmegaConf.merge(CONFIG, own)
    found = experiment_of("digits", quick, jobs, tmp_path)
    assert found["text"] == "Two digits."
    assert found["schedules"][0]["text"] == "1 epoch; small networks and few data: max_epochs=1 'x=[1,2]'."
    without = experiment_of("digits", CONFIG, jobs, tmp_path)
    assert without["text"] == "Not as in what follows, but small networks and few data: max_epochs=1. Ten of them."
    assert (
        experiment_of(
            "digits",
            quick,
            [
                make(tmp_path, "a", 0.5),
                make(tmp_path, "ours", 0.5),
                *(make(tmp_path, name, 0.5) for name in ("b", "ours_too")),
            ],
            tmp_path,
        )["text"]
        == "Ten of them."
    )


def test_a_measure_may_have_a_margin_of_its_own() -> None:
    margins = [measure_of(key, ACC)["margin"] for key in ("test/acc", "val/nll", "test/calibration/ece", "test/size")]
    assert margins == [0.005, 0.02, 0.01, None]
    assert [measure_of("test/acc", {**ACC, "margin": own})["margin"] for own in (0.1, None)] == [0.1, None]


@pytest.mark.parametrize("schedule", ["quick", "default"])
def test_study_says_what_the_runs_were_made_with(schedule: str, tmp_path: Path) -> None:
    jobs = [make(tmp_path, "a", 0.5, 0, schedule), make(tmp_path, "ours", 0.6, 1, schedule, revision="r2")]
    experiment = experiment_of("digits", CONFIG, jobs, tmp_path) if schedule == "quick" else None
    study = study_of(["python", "x", "out=a b"], [experiment] if experiment else [], jobs, (2, 1))
    assert study["command"] == "python x 'out=a b'"
    assert study["quick"] is (schedule == "quick")
    assert study["environment"]["git_revision"] == "r1, r2"
    assert study["environment"]["python"] == "3.11"
    assert study["environment"]["packages"] == {"torch": "2.13"}
    assert study["seconds"] == (30.0 if experiment else 0.0)
