"""The runs of a study in its folder: made within a budget, and found again by the next call."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from mm_lightning.files import alone_in, write_json
from mm_lightning.study.budget import duration
from mm_lightning.study.candidates import Candidate
from mm_lightning.study.course import Failure, Plan, Trial
from mm_lightning.study.forked import Forks
from mm_lightning.study.jobs import Job
from mm_lightning.study.runner import CONFIG, LOG, METRICS, Ended, is_finished, run_each

__all__ = ["StudyRuns"]

_STATE = "study.json"
_OF_THE_STUDY = (
    "callbacks=study",
    "++trainer.enable_checkpointing=false",
    "+diagnostics.study={_target_: mm_lightning.diagnostics.Evaluation, temperature: true}",
)
_ONLY_INPUT = Failure(
    "no hidden layer can be mixed, and at the input alone it is input mixup; python -m mm_lightning.inspect says why"
)


class StudyRuns:
    """Trains candidates with seeds, in the folder of a study.

    Args:
        folder: Of the study.
        words: Overrides of every run.
        settings: What a study is told from another one by; with others the folder is refused.
        budget: Seconds that all calls together may take.
        at_once: Runs at a time.
        devices: See :func:`.run_each`.
        launcher: The same.

    Attributes:
        plan: Of an earlier call; None if there was none.

    Raises:
        ValueError: If the folder holds another study, or something else.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        settings: Mapping[str, Any],
        budget: float,
        at_once: int,
        *,
        devices: Sequence[str] = (),
        launcher: Sequence[str] = (),
    ) -> None:
        self.folder, self.at_once = folder, at_once
        self._words, self._budget = tuple(words), budget
        self._devices, self._launcher = devices, launcher
        self._forks = Forks.of_this_machine()
        state = _state(folder, settings)
        self.plan = Plan(tuple(state["plan"]["methods"]), state["plan"]["search_seeds"]) if state["plan"] else None
        self._state = state
        self._finished: dict[Trial, dict[str, float]] = {}
        self._failed: dict[Trial, Failure] = {}
        self._alone = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> StudyRuns:
        """Keep the folder from other studies.

        Raises:
            RuntimeError: If one is at work in it.
        """
        try:
            self._alone.enter_context(alone_in(self.folder))
        except BlockingIOError:
            raise RuntimeError(
                f"Another mm-study is at work in {self.folder}. Wait for its end, or choose another folder with out=..."
            ) from None
        return self

    def __exit__(self, *error: Any) -> None:
        with self._alone:
            if self._forks is not None:
                self._forks.close()

    def left(self) -> float:
        """Return the seconds of the budget that are left."""
        return float(self._budget - self._state["seconds"])

    def seconds_per_run(self) -> float:
        """Return the mean time of the runs so far."""
        if not self._state["runs"]:  # a study that was killed has not counted the runs that it left
            return fmean(_content(self.job(*trial))["total_seconds"] for trial in self._finished)
        return float(self._state["seconds_of_runs"] / self._state["runs"])

    @property
    def may_grow(self) -> bool:
        """Whether the budget is larger than that which the plan was made for."""
        return self.plan is not None and self._budget > self._state["plan"].get("budget", 0.0)

    def keep_plan(self, plan: Plan) -> None:
        """Keep the plan for later calls, and say what it is."""
        kept = {"methods": list(plan.methods), "search_seeds": plan.search_seeds, "budget": self._budget}
        self._state["plan"] = kept
        self._save()
        searched = (
            f"{plan.search_seeds} seeds to choose strengths by" if plan.search_seeds else "each with its usual strength"
        )
        print(f"Plan  {', '.join(plan.methods)}; {searched}; {duration(self.left())} left.", flush=True)

    def job(self, candidate: Candidate, seed: int) -> Job:
        """Return a run."""
        folder = self.folder / "runs" / candidate.name / f"seed{seed}"
        typed = {word.split("=")[0] for word in self._words}
        unshown = (*_OF_THE_STUDY, *(() if "logger" in typed else ("logger=none",)))
        return Job("study", candidate.method.name, "configured", seed, candidate.words, folder, self._words, unshown)

    def are_finished(self, trials: Sequence[Trial]) -> bool:
        """Whether nothing is left to train of them; what has failed in this call is not tried again."""
        return all(trial in self._failed or self._read(trial) is not None for trial in trials)

    def train(
        self, stage: str, trials: Sequence[Trial], is_limited: bool = False
    ) -> dict[Trial, dict[str, float] | Failure]:
        """Make the runs that are not there.

        Raises:
            ValueError: If ``is_limited``, and a run takes longer than the budget has left.
        """
        self._save()  # before there are runs, which without it are none of a study's
        missing = [trial for trial in trials if trial not in self._failed and self._read(trial) is None]
        by_job = {self.job(*trial).folder: trial for trial in missing}
        before, begin, ends = self._state["seconds"], time.monotonic(), 0
        limit = max(self.left(), 1.0) if is_limited else None

        def ended(one: Ended) -> None:
            nonlocal ends
            ends += 1
            trial = by_job[one.job.folder]
            self._state["seconds"] = before + time.monotonic() - begin
            if one.is_late:
                self._save()
                raise ValueError(_too_slow(one, self._budget))
            if one.error is None:
                self._state["runs"] += 1
                self._state["seconds_of_runs"] += one.seconds
                result: Mapping[str, float] | None = self._read(trial)
            else:
                reason = one.error.partition("error: ")[2] or one.error
                self._failed[trial] = Failure(f"{reason} See {one.job.folder / LOG}.")
                result = None
            self._save()
            count = len(str(len(missing)))
            left = (time.monotonic() - begin) / ends * (len(missing) - ends)
            going = f", about {duration(left)} to go in this part" if ends < len(missing) else ""
            print(
                f"[{ends:{count}}/{len(missing)}] {stage}  {trial[0].title}, seed {trial[1]}  {_short(result)}"
                f"{one.seconds:.0f} s{going}; {duration(max(self.left(), 0.0))} of the budget left",
                flush=True,
            )

        jobs = [self.job(*trial) for trial in missing]
        try:
            places: Any = {"devices": self._devices, "launcher": self._launcher, "forks": self._forks}
            run_each(jobs, self.at_once, ended, **places, limit=limit)
        finally:
            self._state["seconds"] = before + time.monotonic() - begin
            self._save()
        return {trial: self._failed.get(trial) or self._finished[trial] for trial in trials}

    def curve(self, candidate: Candidate, seed: int) -> dict[int, dict[str, float]]:
        """Return what the validations of a finished run have measured, by epoch."""
        path = self.job(candidate, seed).folder / "curve.json"
        points = json.loads(path.read_text(encoding="utf-8"))["validations"] if path.is_file() else []
        return {point["epoch"]: point["metrics"] for point in points}

    def _read(self, trial: Trial) -> dict[str, float] | None:
        if trial not in self._finished:
            job = self.job(*trial)
            if not is_finished(job):
                return None
            content = _content(job)
            metrics = content["metrics"]
            if content.get("layers") == ["input"] and OmegaConf.load(job.folder / CONFIG).mixup.layers == "auto":
                self._failed[trial] = _ONLY_INPUT
            self._finished[trial] = {key: math.nan if value is None else value for key, value in metrics.items()}
        return self._finished[trial]

    def _save(self) -> None:
        write_json(self.folder / _STATE, self._state)


def _content(job: Job) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((job.folder / METRICS).read_text(encoding="utf-8"))
    return content


def _state(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call has left, or the beginning."""
    path = folder / _STATE
    own: dict[str, Any] = json.loads(json.dumps(settings))  # as it is read again
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds something else than a study. Choose another folder with out=...")
        return {"settings": own, "plan": None, "seconds": 0.0, "runs": 0, "seconds_of_runs": 0.0}
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        theirs = state["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Move the folder away, or choose another one.") from error
    for name, value in own.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{folder} holds a study of other settings: {_difference(name, theirs.get(name), value)}. Choose "
                "another folder with out=..., or type the same command; only the budget, seeds and jobs may differ."
            )
    return state


def _difference(name: str, theirs: Any, own: Any) -> str:
    if isinstance(theirs, list) and isinstance(own, list):
        gone, new = ([one for one in a if one not in b] for a, b in ((theirs, own), (own, theirs)))
        parts = [f"without {' '.join(gone)}" if gone else "", f"with {' '.join(new)}" if new else ""]
        return f"this one is {' and '.join(filter(None, parts))}"
    return f"{name} was {theirs}, is {own}"


def _too_slow(one: Ended, budget: float) -> str:
    last = (one.job.folder / LOG).read_text(errors="replace").strip().splitlines()[-1:]
    reached = f"; it had come to: {' '.join(last)}" if last else ""
    return (
        f"budget={duration(budget)} is too small for one run, which was stopped after {one.seconds:.0f} s{reached}. "
        "Give a larger budget, or fewer max_epochs."
    )


def _short(result: Mapping[str, float] | None) -> str:
    if result is None:
        return "failed, "
    shown = {key: result[key] for key in ("val/evaluation/acc", "val/acc", "val_acc", "val_loss") if key in result}
    return "".join(f"{key.replace('/evaluation', '')} {value:.4f}, " for key, value in list(shown.items())[:1])
