"""Print the tables of the README: ``python scripts/readme_tables.py docs/results/reproduction.json``.

The file is the ``metrics.json`` of ``python -m mm_lightning.reproduce``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mm_lightning.command.compare import heading
from mm_lightning.study.form import Experiment, Study
from mm_lightning.study.tables import tables

AGAINST = ("baseline", "input")


def tables_of(study: Study) -> list[str]:
    """Return a Markdown table for each experiment, of its first schedule.

    The last columns say in how many seeds manifold mixup is better than the baseline and than input mixup; where the
    reference schedule says otherwise stands a dagger.
    """
    return [_table(experiment) for experiment in study["experiments"]]


def _table(experiment: Experiment) -> str:
    table = tables(experiment)[0]
    titles = {method["name"]: method["title"] for method in experiment["methods"]}
    lines = [
        ["", *titles.values(), *(f"better than {titles[name]}" for name in AGAINST)],
        ["---"] * (1 + len(titles) + len(AGAINST)),
    ]
    for row in table.rows:
        cells = [f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells]
        lines.append(
            [heading(row.measure), *cells, *(_seeds(experiment, row.measure["key"], name) for name in AGAINST)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seeds(experiment: Experiment, key: str, against: str) -> str:
    for verdict in experiment["verdicts"]:
        if (verdict["key"], verdict["method"], verdict["against"]) == (key, "manifold", against):
            dagger = " †" if verdict["reference_agrees"] is False else ""
            return f"{verdict['better_in']} of {verdict['seeds']}{dagger}"
    return "–"


if __name__ == "__main__":
    print("\n\n".join(tables_of(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
