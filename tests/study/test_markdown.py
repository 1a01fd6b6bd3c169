from __future__ import annotations

import pytest

from mm_lightning.study.markdown import gain
from mm_lightning.study.statistics import compare_paired


@pytest.mark.parametrize(
    ("differences", "better", "text"),
    [
        ([1.0, 2.0, 3.0, 2.0, 2.0], "higher", "**+2.00 ± 0.88**"),
        ([1.0, 2.0, 3.0, 2.0, 2.0], "lower", "+2.00 ± 0.88 (worse)"),
        ([-1.0, -2.0, -3.0], "lower", "−2.00 ± 2.48 (5 seeds)"),
        ([-1.0, 1.0, -0.001], "lower", "+0.00 ± 2.48"),  # of more than 1,000 seeds nobody would read
        ([-0.1, 0.1, 0.0], "lower", "+0.00 ± 0.25 (no difference)"),
        ([2.0], "higher", "+2.00"),
    ],
)
def test_gains_say_what_they_are(differences: list[float], better: str, text: str) -> None:
    assert gain(compare_paired(differences, better, margin=0.5), digits=2) == text
