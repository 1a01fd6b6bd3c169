"""The script of the table in docs/evaluation.md."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return import_module("evaluation_table")


@pytest.mark.parametrize(
    ("places", "factor", "digits", "wanted"),
    [
        (("scores/acc",), 100, 1, "96.5"),
        (("attacks/fgsm_0.1/acc", "attacks/fgsm_0.0314/acc"), 100, 1, "1.2"),
        (("spectra/*/share",), 1, 2, "0.25"),
        (("two/*/share",), 1, 2, "–"),  # it is not said which
        (("scores/acc/deeper",), 1, 2, "–"),
        (("temperature",), 1, 2, "1.34 (1.30 to 1.38)"),
    ],
)
def test_a_cell_is_the_first_number_there_is(
    script: Any, places: tuple[str, ...], factor: float, digits: int, wanted: str
) -> None:
    content = {
        "scores": {"acc": 0.96512},
        "attacks": {"fgsm_0.0314": {"acc": 0.0124}},
        "spectra": {"head:input": {"share": 0.2512}},
        "two": {"a": {"share": 0.1}, "b": {"share": 0.2}},
        "temperature": {"temperature": 1.3391, "low": 1.2965, "high": 1.3824},
    }
    assert script.cell(content, places, factor, digits) == wanted


def test_the_pages_table_is_that_of_the_results(script: Any) -> None:
    assert script.table() in script.PAGE.read_text(encoding="utf-8")
