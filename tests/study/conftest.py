"""A small study, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from mm_lightning.study.form import Experiment, Study

ACCURACY = {"baseline": [0.9, 0.92], "manifold": [0.95, 0.93]}  # by seed
LOSS = {"baseline": [0.25, 0.35], "manifold": [0.4, None]}


def paint(path: Path, level: float) -> None:
    """Write a picture of 4 by 3 pixels in one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.image.imsave(path, np.full((3, 4, 3), level))


@pytest.fixture
def experiment() -> Experiment:
    runs: list[Any] = []
    for schedule, seeds in (("default", [0, 1]), ("reference", [0])):
        for method in ("baseline", "manifold"):
            for seed in seeds:
                metrics = {"test/acc": ACCURACY[method][seed], "test/loss": LOSS[method][seed]}
                run = {"method": method, "schedule": schedule, "seed": seed, "metrics": metrics}
                runs.append({**run, "command": f"train {method} {schedule} {seed}", "seconds": 75.4, "epochs": 3})

    def cell(schedule: str, method: str, key: str, mean: float | None, sd: float | None) -> Any:
        values = [run["metrics"][key] for run in runs if (run["schedule"], run["method"]) == (schedule, method)]
        return {"schedule": schedule, "method": method, "key": key, "mean": mean, "sd": sd, "values": values}

    judged = {"method": "manifold", "against": "baseline", "left_out": [], "margin": None}
    return {
        "name": "digits",
        "title": "Digits",
        "text": "Ten digits.",
        "methods": [{"name": "baseline", "title": "no mixup"}, {"name": "manifold", "title": "manifold mixup"}],
        "schedules": [
            {"name": "default", "text": "3 epochs.", "seconds_per_run": 75.4},
            {"name": "reference", "text": "9 epochs.", "seconds_per_run": None},
        ],
        "measures": [
            {
                **{"key": "test/acc", "title": "test accuracy", "unit": "%", "factor": 100, "digits": 1},
                **{"better": "higher", "meaning": "Share of correct rows.", "margin": 0.005},
            },
            {
                **{"key": "test/loss", "title": "test loss", "unit": "nats", "factor": 1, "digits": 2},
                **{"better": "lower", "meaning": "Mean cross-entropy.", "margin": None},
            },
        ],
        "runs": runs,
        "cells": [
            cell("default", "baseline", "test/acc", 0.91, 0.0141421),
            cell("default", "manifold", "test/acc", 0.94, 0.0141421),
            cell("default", "baseline", "test/loss", 0.3, 0.0707107),
            cell("default", "manifold", "test/loss", 0.4, None),
            cell("reference", "baseline", "test/acc", 0.9, None),
            cell("reference", "manifold", "test/acc", 0.95, None),
            cell("reference", "baseline", "test/loss", 0.25, None),
        ],
        "verdicts": [
            {
                **judged,
                **{"key": "test/acc", "seeds": 2, "difference": 0.03, "half_width": 0.127062, "seeds_needed": 4},
                **{"reference_agrees": True, "verdict": "better"},
            },
            {
                **judged,
                **{"key": "test/loss", "seeds": 1, "difference": 0.1, "half_width": None, "seeds_needed": None},
                **{"reference_agrees": None, "verdict": "not distinguishable"},
            },
        ],
        "pictures": [],
        "players": [],
    }


@pytest.fixture
def study(experiment: Experiment, tmp_path: Path) -> Study:
    """The study, with a picture and three frames in ``tmp_path``."""
    paint(tmp_path / "map.png", 0.5)
    files = [f"frames/{k}.png" for k in range(3)]
    for k, file in enumerate(files):
        paint(tmp_path / file, k / 3)
    labels = ["epoch 1", "epoch 2", "epoch 3"]
    about = {"caption": "Read it.", "alt": "A grey square"}
    experiment["pictures"] = [{**about, "file": "map.png", "title": "Map", "commands": ["draw a", "draw b"]}]
    experiment["players"] = [{**about, "title": "Growth", "labels": labels, "files": files, "commands": ["draw c"]}]
    return {
        "format": 2,
        "quick": False,
        "command": "python -m mm_lightning.reproduce",
        "finished": "2026-11-22T15:30:00+02:00",
        "seconds": 8123.0,
        "jobs": 2,
        "threads_per_job": 1,
        "environment": {
            **{"python": "3.11.7", "platform": "Linux", "processors": 8},
            **{"packages": {"torch": "2.13.0", "numpy": "2.4.6"}, "git_revision": None},
        },
        "experiments": [experiment],
    }
