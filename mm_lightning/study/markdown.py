"""An experiment's tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mm_lightning.study.form import Experiment, Measure
from mm_lightning.study.statistics import Outcome, PairedComparison
from mm_lightning.study.tables import Claim, claims, tables

__all__ = ["difference", "gain", "heading", "markdown", "markdown_table", "unpaired"]


def markdown(experiment: Experiment) -> str:
    """Write an experiment's first table: a row per measure, a column per method; and what its verdicts say.

    The table has ``mean ± sd``, in bold where a method is better than every other. Below it stand the paired
    differences to the first method; one seed, or none in common, is answered by a sentence instead.
    """
    table = tables(experiment)[0]
    rows = {
        heading(row.measure): [f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells]
        for row in table.rows
    }
    titles = [method["title"] for method in table.methods]
    seeds = ", ".join(
        f"{method['title']}: {' '.join(map(str, _seeds(experiment, method['name'])))}" for method in table.methods
    )
    parts = [f"## {experiment['title']}", markdown_table(titles, rows), f"Seeds: {seeds}."]
    return "\n\n".join([*parts, *_differences(experiment)])


def unpaired(experiment: Experiment) -> Iterator[str]:
    """Say of each method that has no seed in common with the first one that they are not compared."""
    first, *others = experiment["methods"]
    for method in others:
        if not {*_seeds(experiment, method["name"])} & {*_seeds(experiment, first["name"])}:
            yield (
                f"{method['title']} has no seed in common with {first['title']}, so they are not compared. "
                "Train both with the same seeds."
            )


def heading(measure: Measure) -> str:
    """Name a measure with its unit and an arrow to the better side."""
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[measure["better"]]
    return f"{measure['title']}{', ' + measure['unit'] if measure['unit'] else ''}{arrow}"


def markdown_table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Lay out cells below the names of columns and beside those of rows."""
    lines = [["", *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference(claim: Claim) -> str:
    """Write a difference with its interval and verdict; how many seeds would tell, where these do not."""
    needed = f" ({claim.needed} seeds needed)" if claim.needed != "–" and claim.outcome == "not distinguishable" else ""
    return f"{claim.difference} {claim.unit}".rstrip() + f", {claim.verdict}{needed}"


def gain(comparison: PairedComparison, digits: int) -> str:
    """Write a comparison of displayed numbers for a wide table: in bold if better, else with what is not plain.

    Behind what is not distinguishable stands how many seeds a difference of this size needs, where that is known.
    """
    needed = comparison.seeds_needed
    notes: dict[Outcome, str] = {"worse": " (worse)", "no difference": " (no difference)"}
    half = "" if comparison.half_width is None else f" ± {comparison.half_width:.{digits}f}"
    # + 0.0: a negative number that rounds to zero has no sign
    text = f"{round(comparison.difference, digits) + 0.0:+.{digits}f}{half}".replace("-", "−")
    if comparison.outcome == "better":
        return f"**{text}**"
    return text + notes.get(comparison.outcome, f" ({needed} seeds)" if needed else "")


def _differences(experiment: Experiment) -> Iterator[str]:
    yield from unpaired(experiment)
    first = experiment["methods"][0]
    judged = list(zip(experiment["verdicts"], claims(experiment), strict=True))
    if not judged:
        return
    if all(verdict["seeds"] < 2 for verdict, _ in judged):
        yield "One seed tells nothing about a difference. Train several, as with -m seed=0,1,2,3,4."
        return
    columns = {verdict["method"]: claim.method for verdict, claim in judged}
    titles = {measure["key"]: heading(measure) for measure in experiment["measures"]}
    keys = dict.fromkeys(verdict["key"] for verdict, _ in judged)
    yield (
        f"Against {first['title']}: the mean of the differences, paired by seed, ± half its 95 % interval "
        "(Student's t); not corrected for the number of intervals."
    )
    yield markdown_table(
        list(columns.values()),
        {titles[key]: [difference(claim) for verdict, claim in judged if verdict["key"] == key] for key in keys},
    )
    if left_out := dict.fromkeys(
        f"{claim.method}: {', '.join(map(str, verdict['left_out']))}"
        for verdict, claim in judged
        if verdict["left_out"]
    ):
        yield f"Left out, as only one of both has these seeds: {'; '.join(left_out)}."


def _seeds(experiment: Experiment, method: str) -> list[int]:
    return [run["seed"] for run in experiment["runs"] if run["method"] == method]
