"""The numbers of an evaluation as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from mm_lightning.diagnostics.evaluation import Evaluation

__all__ = ["table"]

_SCORES = ("acc", "nll", "ece", "brier", "mce", "overconfidence")
_HEADINGS = {"attacks": "Attacks", "deformations": "Deformations", "shifts": "Shifts"}
_HEADINGS |= {"neighbours": "Neighbours", "spectra": "Spectra"}


def table(evaluation: Evaluation) -> str:
    """Return headings of groups, and below each a row for what its numbers are of; empty if there are none."""
    parts = []
    if evaluation.scores:
        rows = {"as it is": evaluation.scores["plain"]}
        if evaluation.fitted is not None:
            mark = " (uncertain)" if evaluation.fitted.is_uncertain else ""
            rows[f"temperature {evaluation.fitted.temperature:.4g}{mark}"] = evaluation.scores["scaled"]
        parts.append(("Scores", rows))
    for group, found in evaluation.groups.items():
        parts.append((_headed(group, evaluation), dict(found)))
    width = max((len(name) for _, rows in parts for name in rows), default=0)
    return "\n".join(line for heading, rows in parts for line in _lines(heading, rows, width))


def _headed(group: str, evaluation: Evaluation) -> str:
    settings = evaluation.settings
    if group == "attacks":
        return f"Attacks, epsilon in {settings['unit']}"
    if group == "neighbours":
        of = settings["neighbours"]
        return f"Neighbours, the {of['k']} nearest of {of['rows']:,} training rows"
    return _HEADINGS[group]


def _lines(heading: str, rows: Mapping[str, Mapping[str, float]], width: int) -> list[str]:
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    names.sort(key=lambda name: _SCORES.index(name) if name in _SCORES else len(_SCORES))
    widths = {name: max(len(name), 8) for name in names}
    head = "".join(f"  {name:>{widths[name]}}" for name in names)
    lines = [heading, f"  {'':{width}}{head}"]
    for name, numbers in rows.items():
        cells = "".join(f"  {_text(numbers.get(key)):>{widths[key]}}" for key in names)
        lines.append(f"  {name:{width}}{cells}")
    return [line.rstrip() for line in lines]


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}" if abs(number) < 1000 else f"{number:,.0f}"
