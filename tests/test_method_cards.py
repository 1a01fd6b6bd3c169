"""The cards of docs/methods: complete, of one form, and with the settings that the files of conf/mixup have."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_lightning.command.configuration import CONF

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (CONF / "mixup").glob("*.yaml") if path.stem != "none")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("method_cards")


def card(name: str) -> str:
    return (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")


def test_cards_table_and_pictures_are_those_of_the_files(cards: Any) -> None:
    assert cards.problems() == []
    assert [way.name for way in cards.ways()][:2] == ["manifold", "input"]
    assert sorted(way.name for way in cards.ways()) == NAMES


def test_what_is_stale_is_named(cards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "methods"
    shutil.copytree(cards.CARDS, folder)
    monkeypatch.setattr(cards, "CARDS", folder)
    monkeypatch.setattr(cards, "INDEX", folder / "README.md")
    assert cards.problems() == []
    page = folder / "cutmix.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<!-- cost -->\n", "<!-- cost -->\n0.01, "), encoding="utf-8")
    assert cards.problems() == ["The cost in docs/methods/cutmix.md is stale: python scripts/method_cards.py"]
    page.write_text(text.replace("# CutMix", "# CutMix!", 1), encoding="utf-8")
    assert cards.problems() == ["The table of docs/methods/README.md is stale: python scripts/method_cards.py"]
    page.write_text(page.read_text(encoding="utf-8").replace("## Source", "## Sources"), encoding="utf-8")
    assert cards.problems()[0].startswith("docs/methods/cutmix.md has the headings ['What it does', ")
    page.rename(folder / "unknown.md")
    (folder / "nfm.png").unlink()
    assert cards.problems() == [
        "docs/methods/cutmix.md is missing.",
        "docs/methods/unknown.md is of no file in conf/mixup.",
        "docs/methods/nfm.png is missing.",
    ]


def test_arguments_are_shown_as_they_are_typed(cards: Any) -> None:
    typed = {way.name: way.arguments for way in cards.ways()}
    assert typed["manifold"] == "schedule=None"
    assert typed["cutmix"] == 'alpha=1.0, layers="input", interpolation=CutMix(), schedule=None'
    assert typed["patchup_hard"] == "probability=0.7, ratio=FixedRatio(lam=0.0), interpolation=PatchUp(), schedule=None"
    assert typed["folded"] == "ratio=FoldedRatio(ratio=BetaRatio()), schedule=None"


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_a_card_are_those_of_its_file(name: str, cards: Any) -> None:
    section = card(name).split("\n## Settings\n")[1].split("\n## Cost\n")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 for row in rows)
    for key, value, _ in rows:
        found: Any = cards.Way(name).config
        for part in key.strip("`").split("."):
            found = found[part]
        assert yaml.safe_load(value.strip("`")) == found, key
    own = {key for key, value in cards.Way(name).settings.items() if value is not None and "_target_" not in str(value)}
    assert own <= {key.strip("`") for key, _, _ in rows}


@pytest.mark.parametrize("name", [*NAMES, "README", "own"])
def test_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", card(name))
    assert links
    for link in links:
        assert link.startswith("https://arxiv.org/abs/") or (ROOT / "docs" / "methods" / link.split("#")[0]).exists()


def test_pictures_are_drawn(cards: Any, tmp_path: Path) -> None:
    draw = importlib.import_module("method_pictures").draw
    for way in cards.ways():
        if way.name in ("tokens", "nearest", "sk_mixup", "manifold_until80"):  # one of each kind
            draw(way.config, way.settings, way.title, tmp_path / f"{way.name}.png")
    assert {path.stem for path in tmp_path.iterdir()} == {"tokens", "nearest", "sk_mixup", "manifold_until80"}
    assert all(5_000 < path.stat().st_size < cards.LARGEST for path in tmp_path.iterdir())
