"""What a study answers: a sentence on the best way to mix, what else would explain it, and a command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mm_lightning.study.candidates import Candidate
from mm_lightning.study.course import Course
from mm_lightning.study.form import Experiment, Measure, Verdict
from mm_lightning.study.tables import count, shown
from mm_lightning.study.verdicts import verdict

__all__ = ["Answer", "answer"]

# Of classifiers, by the last part of the key.
_LIKELIHOOD, _CALIBRATION = "nll_scaled", "ece_scaled"


@dataclass(frozen=True)
class Answer:
    """The end of a study.

    Attributes:
        sentences: The first one is the answer, the others what speaks for and against it.
        command: Trains the winner.
        winner: What it trains.
        course: What was done.
        experiment: The numbers.
    """

    sentences: list[str]
    command: str
    winner: Candidate
    course: Course
    experiment: Experiment


def answer(experiment: Experiment, course: Course, words: Sequence[str]) -> Answer:
    """Put the verdicts of a study into sentences.

    The way to mix that is judged is the one that was best in validation, by what strengths are chosen by, over the
    seeds of the comparison: the test has no part in it.

    Args:
        experiment: Its first measure is the one that decides; verdicts hold each method against ``none``.
        course: What was done.
        words: What every run was told.

    Returns:
        The answer. The winner is the best in validation of all whose verdict is better; ``none`` where there is none.
    """
    measure = experiment["measures"][0]
    by_name = {candidate.method.name: candidate for candidate in course.chosen}
    first, *others = course.chosen
    of = {item["method"]: item for item in experiment["verdicts"] if item["key"] == measure["key"]}
    mixing = [one for one in others if not one.method.is_control]
    controls = [one for one in others if one.method.is_control]
    sentences: list[str] = []
    if mixing:
        best = _best_in_validation(mixing, course)
        sentences.append(_main(best, of[best.method.name], measure))
        sentences += _others(mixing, best, of, measure)
        sentences += [_control(one, best, of, experiment, measure) for one in controls]
        sentences += _quality(best, experiment)
    else:
        sentences += [f"{_upper(one.title)}: {_gain(of[one.method.name], measure)}." for one in controls]
    if measure["key"] == course.objective.key:
        sentences.append(
            f"There is no test of {measure['title']}: the validation that has chosen is the one that judges, so that "
            "a gain may be a little too large."
        )
    sentences += [f"Left out: {title} ({reason.rstrip('.')})." for title, reason in course.left_out.items()]
    better = [by_name[name] for name, item in of.items() if item["verdict"] == "better"]
    winner = _best_in_validation(better, course) if better else first
    command = ["python", "-m", "mm_lightning.train", *words, *winner.words]
    if winner is first:
        sentences.append("Nothing is shown to be better than no mixup here: keep to it.")
    elif not mixing or winner is not best:
        sentences.append(f"Of what is better than {first.title}, {winner.title} is the best in validation.")
    return Answer(sentences, shlex.join(command), winner, course, experiment)


def _best_in_validation(candidates: Sequence[Candidate], course: Course) -> Candidate:
    sign = 1 if course.objective.better == "higher" else -1

    def mean(candidate: Candidate) -> float:
        scores = [course.results[candidate, seed].get(course.objective.key) for seed in course.seeds]
        known = [score for score in scores if score is not None and math.isfinite(score)]
        return sign * sum(known) / len(known) if len(known) == len(scores) and known else float("-inf")

    return max(candidates, key=mean)


def _main(best: Candidate, found: Verdict, measure: Measure) -> str:
    if not found["seeds"]:
        return f"Nothing can be said of {best.title}: with no seed both it and no mixup have {measure['title']}."
    beginning = {
        "better": "Use it",
        "worse": "Do not use it here",
        "no difference": "It makes no difference here",
        "not distinguishable": "Not distinguishable from no mixup",
    }[found["verdict"]]
    if found["seeds"] < 2:
        beginning = "One seed tells nothing"
    return f"{beginning}: {best.title}, {_gain(found, measure)}{_more(found)}."


def _gain(found: Verdict, measure: Measure) -> str:
    unit = {"%": " points"}.get(measure["unit"], f" {measure['unit']}".rstrip())
    half = "" if found["half_width"] is None else f" ± {shown(found['half_width'], measure)}"
    difference, seeds = shown(found["difference"], measure, "+"), count(found["seeds"], "seed")
    direction = " (lower is better)" if measure["better"] == "lower" else ""
    return f"{difference}{half}{unit} of {measure['title']}{direction} over no mixup ({seeds})"


def _more(found: Verdict) -> str:
    if found["seeds"] < 2:
        return "; a larger budget goes on from here"
    if found["verdict"] != "not distinguishable" or found["half_width"] is None:
        return ""
    if found["difference"] is not None and abs(found["difference"]) > found["half_width"]:
        return "; with other seeds there is no value, and so no verdict"
    needed = found["seeds_needed"]
    if needed is None:
        return "; more than 1,000 seeds would be needed to see a difference of this size"
    return f"; a difference of this size takes about {needed} seeds to be seen"


def _others(mixing: Sequence[Candidate], best: Candidate, of: dict[str, Verdict], measure: Measure) -> Iterator[str]:
    """The other ways to mix."""
    texts = [f"{one.title} {_brief(of[one.method.name], measure)}" for one in mixing if one is not best]
    if texts:
        yield f"Chosen by validation among the ways to mix; the others, over no mixup: {'; '.join(texts)}."


def _control(
    control: Candidate, best: Candidate, of: dict[str, Verdict], experiment: Experiment, measure: Measure
) -> str:
    """What a regulariser that mixes nothing does, and whether it explains a gain of mixing."""
    own, schedules = of[control.method.name], [experiment["schedules"][0]["name"]]
    against = verdict(experiment["runs"], measure, best.method.name, control.method.name, schedules)
    title, gain = _upper(control.title), f"{_brief(own, measure)} over no mixup"
    held = f"mixing against it {_brief(against, measure)}"
    if of[best.method.name]["verdict"] != "better":
        return f"{title}: {gain}; {held}."
    if against["verdict"] == "better":
        return f"{title} does not explain it: {gain}; {held}."
    if against["verdict"] == "worse":
        return f"{title} does more: {gain}; {held}."
    return f"{title} may do as well: {gain}; {held}."


def _quality(best: Candidate, experiment: Experiment) -> Iterator[str]:
    """Likelihood and calibration after temperature, where they were measured."""
    measures = {measure["key"].rpartition("/")[2]: measure for measure in experiment["measures"]}
    texts = []
    for name, title in ((_LIKELIHOOD, "NLL"), (_CALIBRATION, "calibration (ECE)")):
        if name in measures:
            found = next(
                item
                for item in experiment["verdicts"]
                if item["key"] == measures[name]["key"] and item["method"] == best.method.name
            )
            outcome = found["verdict"] if found["seeds"] > 1 else "from one seed only"
            texts.append(f"{title} after temperature is {_IS[outcome]} ({_brief(found, measures[name], False)})")
    if texts:
        yield f"{_upper('; '.join(texts))}."


_IS = {
    "better": "better",
    "worse": "worse",
    "no difference": "no different",
    "not distinguishable": "not distinguishable",
    "from one seed only": "from one seed only",
}


def _brief(found: Verdict, measure: Measure, with_verdict: bool = True) -> str:
    half = "" if found["half_width"] is None else f" ± {shown(found['half_width'], measure)}"
    text = f"{shown(found['difference'], measure, '+')}{half}"
    return f"{text} ({found['verdict']})" if with_verdict else text


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
