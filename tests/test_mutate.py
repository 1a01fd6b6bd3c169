"""scripts/mutate.py: which changes it makes. What survives them is for people to look at."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

SOURCE = '''"""A module of 1 thing."""


def f(x: int = 0) -> bool:
    """Compare 2 numbers."""
    note(x)
    if x < 1 and not -x:
        raise ValueError(f"{x + 1} is wrong")
    return x in (
        3,
    )


def draw(axes):
    axes.plot(5)
'''


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("mutate")


def test_conditions_numbers_results_and_calls_are_changed_one_at_a_time(mutate: Any) -> None:
    found = mutate.mutations_of("a.py", SOURCE)
    assert sorted((one.line, one.before, one.after) for one in found) == [
        (4, "0", "1"),
        (6, "note(x)", "pass"),
        (7, "-x", "(+x)"),
        (7, "1", "2"),
        (7, "not -x", "bool(-x)"),
        (7, "x < 1", "x <= 1"),
        (7, "x < 1 and not -x", "(x < 1) or (not -x)"),
        (10, "3", "4"),
    ]
    for one in found:
        changed = one.applied(SOURCE.encode()).decode()
        ast.parse(changed)
        assert [a == b for a, b in zip(changed.splitlines(), SOURCE.splitlines(), strict=True)].count(False) == 1


def test_places_are_those_of_the_file_where_letters_take_two_bytes(mutate: Any) -> None:
    (one,) = mutate.mutations_of("a.py", 'x = "ü" == y\n')
    assert one.applied('x = "ü" == y\n'.encode()).decode() == 'x = "ü" != y\n'


def test_a_choice_is_the_same_each_time_and_of_every_folder(mutate: Any) -> None:
    chosen = mutate.sampled(12, seed=3)
    assert chosen == mutate.sampled(12, seed=3) != mutate.sampled(12, seed=4)
    assert [one.path.split("/")[1] for one in chosen] == [name for name in mutate.FOLDERS for _ in range(12)]
