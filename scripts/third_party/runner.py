"""Train the cases of one package, in its own environment, and print what came of them as JSON.

python -m third_party.runner pytorch_forecasting
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import traceback
import warnings
from importlib.metadata import version
from typing import Any

import torch

WANTED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far a step may be from the reference, as a share of the largest gradient."""
VERBOSE = "--verbose" in sys.argv


def main(name: str) -> None:
    from third_party import packages

    package = packages.BY_NAME[name]
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    cases = importlib.import_module(f"third_party.{name}").cases()
    only = [argument for argument in sys.argv[2:] if not argument.startswith("-")]
    results: list[dict[str, Any]] = []
    for case in cases:
        if not only or case.name in only:
            found = results_of(case)
            for one in found:
                print(one["case"], one["layer"], one["outcome"], one["detail"], one["note"], sep=" | ", file=sys.stderr)
            results += found
    print("RESULTS " + json.dumps({"version": version(package.distribution), "results": results}))


def results_of(case: Any) -> list[dict[str, Any]]:
    """Train a case plain and mixed at each of its layers; of ``"auto"``, at each layer that it chooses."""
    from third_party.one_step import Bench

    found: list[dict[str, Any]] = []
    bench, failure = None, ""
    for dtype in WANTED:
        bench = Bench(case, dtype)
        failure = _failure_of_plain(bench)
        warnings.simplefilter("ignore")
        if not failure:
            break
    if failure:
        return [_result(case, "–", "plain training fails", failure)]
    for layer in case.layers:
        if any(layer == result["layer"] for result in found):
            continue  # which "auto" has chosen
        first = _mixed_at(bench, layer)
        chosen = first.pop("chosen", ())
        found += [first] + [_without_chosen(_mixed_at(bench, name)) for name in chosen if name != first["layer"]]
    return found


def _failure_of_plain(bench: Any) -> str:
    try:
        bench.train(bench.batch(), bench.module())
    except Exception as error:
        if VERBOSE:
            traceback.print_exc()
        return f"{type(error).__name__}: {_line(error)}"
    return ""


def _mixed_at(bench: Any, layer: str) -> dict[str, Any]:
    from third_party.one_step import difference

    case, module = bench.case, bench.module()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            got, plan, chosen = bench.mixed(module, "auto" if layer == "auto" else [layer])
        except Exception as error:
            if VERBOSE:
                traceback.print_exc()
            return _result(case, layer, "refused", f"{type(error).__name__}: {_line(error)}")
    note = next((_line(w.message) for w in said if "is mixed, but" in str(w.message)), "")
    wanted = bench.reference(plan)
    off = difference(got, wanted)
    unmixed = difference(bench.reference(plan, own_targets_only=True), wanted)
    bound = WANTED[bench.dtype]
    name = {torch.float64: "", torch.float32: ", in float32"}[bench.dtype]
    if not off < bound:
        outcome, detail = "WRONG", f"loss or gradients differ by {off:.1e} of the largest{name}"
    elif case.has_targets and unmixed < 100 * bound:
        outcome, detail = "undecided", f"own targets alone would give the same step to {unmixed:.0e}"
    else:
        # Rounded up to a power of ten, because the last bits differ from machine to machine.
        outcome, detail = "exact", f"< 1e{math.ceil(math.log10(max(off, 1e-15)))}{name}"
    result = _result(case, plan.layer or layer, outcome, detail, note)
    return {**result, "chosen": chosen if layer == "auto" else (), "is_chosen": layer == "auto"}


def _without_chosen(result: dict[str, Any]) -> dict[str, Any]:
    result.pop("chosen", None)
    return {**result, "is_chosen": True}


def _result(case: Any, layer: str, outcome: str, detail: str, note: str = "") -> dict[str, Any]:
    return {
        "case": case.name,
        "loss": case.loss,
        "layer": layer,
        "outcome": outcome,
        "detail": detail,
        "note": note,
        "is_chosen": False,
    }


def _line(error: Any) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main(sys.argv[1])
