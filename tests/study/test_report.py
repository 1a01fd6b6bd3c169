from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mm_lightning.study.form import Study
from mm_lightning.study.report import write_report


class _Page(HTMLParser):
    """What a page consists of: its tags with their attributes, and the texts of its table rows and of all the rest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._is_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._is_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.text += {"dt": ": ", "dd": "\n"}.get(tag, "")
        self._is_cell &= tag not in ("td", "th")

    def row(self, *starts: str) -> list[str]:
        """The one row whose cells begin with these texts, white space (thin, too) condensed."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        (row,) = [row for row in rows if all(cell.startswith(start) for cell, start in zip(row, starts, strict=False))]
        return row

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(study: Study, folder: Path) -> _Page:
    return _Page(write_report(study, folder).read_text(encoding="utf-8"))


def test_verdicts_stand_at_the_top(study: Study, tmp_path: Path):
    page = _page(study, tmp_path)
    assert (
        "1 experiment in the manner of Verma et al. (2019), 6 runs, 2 claims: 1\xa0better, none\xa0worse, " in page.text
    )
    assert "none\xa0no difference, 1\xa0not distinguishable.\n" in page.text
    row = page.row("better")
    assert row == ["better", "higher test accuracy", "no mixup", "+3.0 ± 12.7 pp", "2", "4", "agrees"]
    row = page.row("one seed tells nothing")
    assert row == ["one seed tells nothing", "lower test loss", "no mixup", "+0.10 nats", "1", "–", "–"]
    shapes = {attributes["class"] for attributes in page.all("svg") if "icon" in (attributes.get("class") or "")}
    assert shapes == {"icon better", "icon not-distinguishable"}


def test_no_column_speaks_of_a_reference_that_was_not_run(study: Study, tmp_path: Path):
    study["title"] = "Runs side by side"
    verdict = study["experiments"][0]["verdicts"][0]
    verdict.update(reference_agrees=None, verdict="no difference", margin=0.005)
    page = _page(study, tmp_path)
    row = page.row("no difference")
    assert row == ["no difference larger than 0.5 pp", "higher test accuracy", "no mixup", "+3.0 ± 12.7 pp", "2", "4"]
    assert page.row("verdict")[-1] == "seeds needed"
    assert "1 experiment, 6 runs, 2 claims" in page.text


def test_tables_show_every_mean(study: Study, tmp_path: Path):
    study["experiments"][0]["runs"][3]["metrics"]["test/acc"] = 0.969  # better than the other one, 5 and 4.9 points
    page = _page(study, tmp_path)
    name, scale, baseline, manifold = page.row("test accuracy, %", "96.9")
    assert name == "test accuracy, % ↑, higher is better Share of correct rows."
    assert (scale, baseline[:10]) == ("96.990.0", "91.0 ± 1.4")
    assert manifold.startswith("★better than the others: 94.0 ± 1.4")
    assert page.row("test accuracy, % ↑, higher is better", "90.0", "95.0")[0].endswith("better")  # one seed: no star
    assert page.row("test loss, nats", "0.25", "–")
    assert page.row("manifold", "reference", "0", "3", "1 min 15 s", "train manifold reference 0")


def test_origin_is_told(study: Study, tmp_path: Path):
    text = " ".join(_page(study, tmp_path).text.split())
    for fact in (
        "finished: 22 November 2026, 13:30 UTC time of all runs: 2 h 15 min one after the other; "
        "2 runs at a time with 1 thread each",
        "machine: Linux, 8 processors git revision: – Python: 3.11.7 packages: torch 2.13.0, numpy 2.4.6",
        "default schedule: 3 epochs. A run takes 1 min 15 s. reference schedule: 9 epochs.",
    ):
        assert fact in text
    assert "A quick study" not in text


def test_quick_studies_judge_nothing(study: Study, tmp_path: Path):
    study["quick"] = True
    text = _page(study, tmp_path).text
    assert "too small to judge the claims" in text
    assert "2 claims.\n" in text


def test_rule_of_the_verdicts_is_optional(study: Study, tmp_path: Path):
    study["rule"] = "All seeds agree."
    assert "All seeds agree. pp: percentage points." in _page(study, tmp_path).text


def test_pictures_are_embedded_and_nothing_is_loaded(study: Study, tmp_path: Path):
    page = _page(study, tmp_path)
    addresses = [
        value or "" for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    files = ["map.png", "frames/0.png", "frames/1.png", "frames/2.png"]
    pictures = [address.split(",", 1)[1] for address in addresses if address.startswith("data:image/png;base64,")]
    assert [base64.b64decode(picture) for picture in pictures] == [(tmp_path / file).read_bytes() for file in files]
    assert [address for address in addresses if not address.startswith("data:")] == ["#digits"]
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text
    policy = next(tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_texts_cannot_become_markup(study: Study, tmp_path: Path):
    clean = _page(study, tmp_path)
    evil = """</script><script>"'&<b>"""
    (experiment,) = study["experiments"]
    study["command"] = study["rule"] = experiment["title"] = experiment["text"] = evil
    experiment["pictures"][0].update(title=evil, caption=evil, alt=evil, commands=[evil])
    experiment["players"][0].update(title=evil, caption=evil, alt=evil, labels=[evil] * 3, commands=[evil, evil])
    experiment["methods"][0]["title"] = experiment["measures"][0]["title"] = experiment["measures"][0]["unit"] = evil
    experiment["runs"][0]["command"] = experiment["schedules"][0]["text"] = evil
    page = _page(study, tmp_path)
    assert len(page.all("script")) == len(clean.all("script")) == 1
    assert page.all("b") == []
    assert page.text.count(evil) > 15
    assert page.all("img")[0]["alt"] == evil


def test_pictures_and_tables_are_described(study: Study, tmp_path: Path):
    page = _page(study, tmp_path)
    assert page.all("html") == [{"lang": "en"}]
    assert [image["alt"] for image in page.all("img")][:3] == [
        "A grey square",
        "A grey square (epoch 1)",
        "A grey square (epoch 2)",
    ]
    # without scripts the last frame is shown; the last picture is the one that is enlarged
    assert ["hidden" in image for image in page.all("img")] == [False, True, True, False, False]
    assert [button["aria-label"] for button in page.all("button") if "aria-label" in button] == [
        "Show in full size: Map",
        "Play",
    ]
    assert {header.get("scope") for header in page.all("th")} == {"col", "row", "rowgroup"}
    assert len(page.all("caption")) == 3  # the verdicts and two schedules


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_of_text_have_contrast(study: Study, tmp_path: Path, theme: int):
    text = write_report(study, tmp_path).read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)[theme]
    luminance = {}
    for name, colour in re.findall(r"--([a-z-]+): #([0-9a-f]{6})", block):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance[name] = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    for name in ("ink", "soft", "accent", "better", "open", "worse"):
        for ground in ("paper", "raised"):
            dark, light = sorted((luminance[name], luminance[ground]))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_older_page_survives_a_missing_picture(study: Study, tmp_path: Path):
    path = write_report(study, tmp_path)
    older = path.read_bytes()
    (tmp_path / "frames" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"picture 'frames/1\.png', which is not in .*Draw it first"):
        write_report(study, tmp_path)
    assert path.read_bytes() == older
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frames", "index.html", "map.png"]


def test_older_page_survives_a_full_disk(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_report(study, tmp_path)
    older = path.read_bytes()
    study["command"] = "another"

    def fill_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(study, tmp_path)
    assert path.read_bytes() == older


def test_misuse_is_named(study: Study, tmp_path: Path):
    (experiment,) = study["experiments"]
    experiment["players"][0]["labels"] = ["epoch 1"]
    with pytest.raises(ValueError, match=r"Player 'Growth' needs a label for each file .* got 1 labels and 3 files"):
        write_report(study, tmp_path)
    experiment["players"] = []
    experiment["pictures"][0]["file"] = "map.pdf"
    with pytest.raises(ValueError, match=r"'map\.pdf' cannot be embedded\. Save it as one of \.png"):
        write_report(study, tmp_path)
    study["format"] = 1  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match="has format 1, expected 2"):
        write_report(study, tmp_path)
