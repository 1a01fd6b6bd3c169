"""Print the tables of the README: ``python scripts/readme_tables.py docs/results/reproduction.json``.

The file is the ``metrics.json`` of ``python -m mm_lightning.reproduce``. With ``--judge`` its runs are judged anew, by
the measures in ``conf/reproduction``, and the file is written with what came of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mm_lightning.files import write_json
from mm_lightning.study.collect import RULE, measure_of, verdicts_of
from mm_lightning.study.form import Experiment, Study
from mm_lightning.study.markdown import heading, markdown_table
from mm_lightning.study.tables import Claim, claims, tables

CONF = Path(__file__).resolve().parents[1] / "conf/reproduction"
AGAINST = ("baseline", "input")


def judged(study: Study) -> Study:
    """Judge a study's runs by the measures that ``conf/reproduction`` describes now."""
    return {**study, "format": 2, "rule": RULE, "experiments": [_judged(one) for one in study["experiments"]]}


def _judged(experiment: Experiment) -> Experiment:
    config: Any = OmegaConf.load(CONF / f"{experiment['name']}.yaml")[experiment["name"]]
    measures = [measure_of(str(key), about) for key, about in config.measures.items()]
    schedules = [schedule["name"] for schedule in experiment["schedules"]]
    verdicts = verdicts_of(config, measures, experiment["runs"], schedules)
    return {**experiment, "measures": measures, "verdicts": verdicts}


def tables_of(study: Study) -> list[str]:
    """Return a Markdown table for each experiment, of its first schedule.

    The last columns hold manifold mixup against the baseline and against input mixup: the verdict and the paired
    difference, and in brackets how many seeds would tell where these do not. Where the reference schedule has the other
    sign stands a dagger.
    """
    return [_table(experiment) for experiment in study["experiments"]]


def _table(experiment: Experiment) -> str:
    titles = {method["name"]: method["title"] for method in experiment["methods"]}
    said = {
        (verdict["key"], verdict["against"]): claim
        for verdict, claim in zip(experiment["verdicts"], claims(experiment), strict=True)
        if verdict["method"] == "manifold"
    }
    rows = {}
    for row in tables(experiment)[0].rows:
        cells = [f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells]
        rows[heading(row.measure)] = cells + [_said(said.get((row.measure["key"], name))) for name in AGAINST]
    return markdown_table([*titles.values(), *(f"against {titles[name]}" for name in AGAINST)], rows)


def _said(claim: Claim | None) -> str:
    if claim is None:
        return "–"
    is_open = claim.outcome == "not distinguishable"
    return f"{claim.verdict}: {claim.difference}{f' ({claim.needed})' * is_open}{' †' * (claim.agrees is False)}"


def main() -> None:
    """Print the tables, and write the verdicts if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="metrics.json of a study")
    parser.add_argument("--judge", action="store_true", help="judge its runs anew, and write the file")
    arguments = parser.parse_args()
    study = json.loads(arguments.file.read_text(encoding="utf-8"))
    if arguments.judge:
        study = judged(study)
        write_json(arguments.file, dict(study))
    print("\n\n".join(tables_of(study)))


if __name__ == "__main__":
    main()
