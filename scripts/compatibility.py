"""Train every module of tests/zoo for a step under the callback, and write what came of it into docs/compatibility.md.

    python scripts/compatibility.py

It needs transformers. It ends with an error if a step is neither exact nor refused, or not what its entry demands.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import beside  # noqa: E402
import matrix  # noqa: E402
from tables import between_marks  # noqa: E402
from zoo import ENTRIES, Entry  # noqa: E402
from zoo.one_batch import train_mixed  # noqa: E402
from zoo.reference import assert_exact, deviation, reference  # noqa: E402

HEAD = """# What the callback works with

## Versions

Made by `python scripts/matrix.py`: the tests that are not slow, with other versions than those of `constraints.txt`.
The lower bounds in `setup.cfg` are the versions of the first line.

<!-- matrix -->
<!-- /matrix -->

## Beside other packages

Made by `python scripts/beside.py`: the release that pip takes of a package into an empty environment, alone and
together with this one, and of what both need (an arrow: what changes).

<!-- beside -->
<!-- /beside -->

## Modules that know nothing of it

Made by `python scripts/compatibility.py`, which trains every module of [tests/zoo](../tests/zoo) for one step in
float64. A step is **exact** if its losses and gradients are `lam * (of own targets) + (1 - lam) * (of the partners'
targets)`, at the hidden states mixed at the layer, as two plain runs of the same step say: the number is a bound on the
difference of the gradients. Or it is **refused**, with the message shown.

Of {total} steps, {exact} are exact, {refused} are refused and {WRONG} are neither.
The LightningModules of public packages themselves are in [third_party.md](third_party.md).

| domain | module | how it computes its loss | layer | result |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    lines, wrong, counts = [], [], {"exact": 0, "refused": 0, "WRONG": 0}
    steps = [(entry, layer) for entry in ENTRIES for layer in entry.layers]
    for entry, layer in steps:
        outcome, detail = _train(entry, layer)
        counts[outcome] += 1
        lines.append(_row(entry.domain, entry.name, entry.style, f"`{layer}`", f"{outcome}: {detail}"))
        if outcome == "WRONG" or not re.search(entry.refused or "^<", detail):
            wrong.append(f"{entry.name} at {layer} is {outcome}: {detail}")
    text = HEAD.format(total=len(steps), **counts) + "".join(lines)
    for script in (matrix, beside):
        record = json.loads(script.RECORD.read_text(encoding="utf-8"))
        text = between_marks(text, script.__name__, script.table(record))
    (ROOT / "docs" / "compatibility.md").write_text(text, encoding="utf-8")
    print(f"{counts['exact']} exact, {counts['refused']} refused, {len(wrong)} not what their entries demand")
    if wrong:
        sys.exit("\n".join(wrong))


def _train(entry: Entry, layer: str) -> tuple[str, str]:
    try:
        got, plan = train_mixed(entry, layer)
    except (RuntimeError, TypeError, ValueError) as error:
        return "refused", " ".join(str(error).split())
    wanted = reference(entry, plan)
    try:
        assert_exact(got, wanted)
    except AssertionError:
        return "WRONG", f"gradients differ by {deviation(got, wanted):.1e}"
    # Rounded up to a power of ten, because the last bits differ from machine to machine.
    return "exact", f"< 1e{math.ceil(math.log10(max(deviation(got, wanted), 1e-15)))}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(re.sub(r"([|*_<])", r"\\\1", cell) for cell in cells) + " |\n"


if __name__ == "__main__":
    main()
