"""A study's runs in its folder: counted against its budget, found again, told from those of another study."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from mm_lightning.command.configuration import CONF
from mm_lightning.study import runner, study_runs
from mm_lightning.study.candidates import Candidate, StudyMethod
from mm_lightning.study.course import Failure, Plan
from mm_lightning.study.study_runs import StudyRuns

NONE = StudyMethod("none", "no mixup", ("mixup=none",), None, (), False).candidates[0]
HALF, ONE = StudyMethod("manifold", "manifold mixup", ("mixup=manifold",), "alpha", (0.5, 1.0), False).candidates
AT_INPUT = StudyMethod("input", "input mixup", ("mixup=input",), None, (), False).candidates[0]
SETTINGS = {"runs": ["data=spirals"], "metric": "auto"}
# Stands for a training: it finds its folder in ``folder`` and its words in ``words``.
SUCCESS = '(folder / \'metrics.json\').write_text(\'{"metrics": {"val/acc": 0.75, "test/nll": null}}\')'
FAILURE = "print('error: no layer can be mixed.'); sys.exit(1)"


@pytest.fixture(autouse=True)
def hydra_is_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(study_runs.Forks, "of_this_machine", staticmethod(lambda: None))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a script stand for all trainings from now on; returns their words."""
    calls: list[list[str]] = []
    popen = runner.subprocess.Popen

    def stands(script: str, composed: Any) -> list[list[str]]:
        def start(command: list[str], **settings: Any) -> Any:
            calls.append(command)
            folder = Path(command[-1].removeprefix('hydra.run.dir="').removesuffix('"'))
            OmegaConf.save(OmegaConf.create(composed(folder)), folder / "config.yaml")
            code = f"import pathlib, sys\nfolder, words = pathlib.Path({str(folder)!r}), {command!r}\n{script}"
            return popen([sys.executable, "-c", code], **settings)

        monkeypatch.setattr(runner.subprocess, "Popen", start)
        return calls

    return stands


def runs_in(folder: Path, budget: float = 3600, **settings: Any) -> StudyRuns:
    return StudyRuns(folder, ["data=spirals"], {**SETTINGS, **settings}, budget, at_once=2)


def of(runs: StudyRuns) -> Any:
    """What the job in a folder would be composed of."""
    jobs = {runs.job(one, seed).folder: runs.job(one, seed) for one in (NONE, HALF, ONE, AT_INPUT) for seed in range(3)}
    return lambda folder: runner.composed(jobs[folder])


def test_a_run_is_made_once_and_found_by_the_next_call(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study")
    calls = trained(SUCCESS, of(runs))
    trials = [(NONE, 0), (HALF, 1)]
    found = runs.train("search", trials)
    assert [dict(found[trial])["val/acc"] for trial in trials] == [0.75, 0.75]
    assert str(dict(found[trials[0]])["test/nll"]) == "nan"
    assert sorted(call[3:7] for call in calls)[1] == ["data=spirals", "mixup=none", "seed=0", "callbacks=study"]
    again = runs_in(tmp_path / "study")
    assert again.are_finished(trials)
    assert not again.are_finished([(ONE, 0)])
    assert dict(again.train("search", trials)[NONE, 0])["val/acc"] == 0.75
    assert len(calls) == 2


def test_time_is_counted_over_calls(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study", 100)
    trained("import time; time.sleep(0.5)\n" + SUCCESS, of(runs))
    runs.train("search", [(NONE, 0)])
    assert 98 < runs.left() < 99.6
    again = runs_in(tmp_path / "study", 200)
    assert again.left() - runs.left() == pytest.approx(100)
    assert 0.5 <= again.seconds_per_run() == runs.seconds_per_run() < 2


def test_the_first_run_finds_a_folder_that_is_a_study_s(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study")
    trained("assert (folder.parents[2] / 'study.json').is_file()\n" + SUCCESS, of(runs))
    assert not isinstance(runs.train("first runs", [(NONE, 0)])[NONE, 0], Failure)


def test_runs_that_a_killed_study_has_not_counted_have_a_time(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study")
    trained(SUCCESS.replace("{", '{"total_seconds": 7.0, ', 1), of(runs))
    runs.train("first runs", [(NONE, 0)])
    path = tmp_path / "study" / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "runs": 0, "seconds_of_runs": 0.0}))
    again = runs_in(tmp_path / "study")
    again.train("first runs", [(NONE, 0)])
    assert again.seconds_per_run() == 7.0


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked")
def test_two_studies_at_once_are_refused(tmp_path: Path) -> None:
    with runs_in(tmp_path / "study"):
        second = runs_in(tmp_path / "study")
        with (
            pytest.raises(RuntimeError, match=r"^Another mm-study is at work in .*study\. Wait for its end, or"),
            second,
        ):
            pass
    with runs_in(tmp_path / "study"):
        pass


def test_mixing_at_the_input_alone_is_no_manifold_mixup(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study")
    trained(SUCCESS.replace("{", '{"layers": ["input"], ', 1), of(runs))
    for study in (runs, runs_in(tmp_path / "study")):
        found = study.train("search", [(ONE, 0), (AT_INPUT, 0)])
        assert str(found[ONE, 0]).startswith("no hidden layer can be mixed, and at the input alone it is input mixup")
        assert not isinstance(found[AT_INPUT, 0], Failure)


def test_a_failure_is_its_last_line_and_is_not_tried_twice(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study")
    calls = trained(FAILURE, of(runs))
    found = runs.train("search", [(ONE, 0)])[ONE, 0]
    assert isinstance(found, Failure)
    assert found.startswith("no layer can be mixed. See ")
    assert found.endswith("log.txt.")
    runs.train("search", [(ONE, 0)])
    assert len(calls) == 1
    assert not runs_in(tmp_path / "study").are_finished([(ONE, 0)])


def test_a_first_run_that_takes_more_than_the_budget_is_stopped(tmp_path: Path, trained: Any) -> None:
    runs = runs_in(tmp_path / "study", 1)
    trained("print('epoch 3/9', flush=True); import time; time.sleep(60)", of(runs))
    with pytest.raises(
        ValueError, match=r"budget=1s is too small for one run, .* it had come to: epoch 3/9\. Give a larger"
    ):
        runs.train("first runs", [(NONE, 0)], is_limited=True)


def test_the_plan_is_kept(tmp_path: Path) -> None:
    assert runs_in(tmp_path / "study").plan is None
    runs_in(tmp_path / "study").keep_plan(Plan(("none", "manifold"), 4))
    assert runs_in(tmp_path / "study").plan == Plan(("none", "manifold"), 4)
    assert not runs_in(tmp_path / "study").may_grow
    assert runs_in(tmp_path / "study", 4000).may_grow


def test_the_folder_of_another_study_is_refused_and_left(tmp_path: Path) -> None:
    runs_in(tmp_path / "study").keep_plan(Plan(("none",), 0))
    before = (tmp_path / "study" / "study.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"holds a study of other settings: this one is without data=spirals and with data=mnist\."
    ):
        runs_in(tmp_path / "study", runs=["data=mnist"])
    with pytest.raises(ValueError, match=r"other settings: metric was auto, is val_loss\. Choose another folder"):
        runs_in(tmp_path / "study", metric="val_loss")
    assert (tmp_path / "study" / "study.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_a_friend.txt").touch()
    with pytest.raises(ValueError, match="holds something else than a study"):
        runs_in(tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["to_a_friend.txt"]


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_a_damaged_state_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=r"study\.json cannot be read .* Move the folder away"):
        runs_in(tmp_path)


def test_curves_are_read(tmp_path: Path) -> None:
    runs = runs_in(tmp_path / "study")
    folder = runs.job(NONE, 0).folder
    folder.mkdir(parents=True)
    (folder / "curve.json").write_text(json.dumps({"validations": [{"epoch": 2, "metrics": {"val/acc": 0.5}}]}))
    assert runs.curve(NONE, 0) == {2: {"val/acc": 0.5}}
    assert runs.curve(NONE, 1) == {}


def test_a_launcher_makes_a_sweep_of_one_in_the_run_s_folder(tmp_path: Path) -> None:
    job = runs_in(tmp_path / "study").job(Candidate(HALF.method, 0.5), 3)
    words = job.arguments_for(["hydra/launcher=joblib"])
    assert words[0] == "--multirun"
    assert words[-3:] == ["hydra/launcher=joblib", f'hydra.sweep.dir="{job.folder}"', "hydra.sweep.subdir=."]
    assert job.command == "python -m mm_lightning.train data=spirals mixup=manifold alpha=0.5 seed=3"
