from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mm_lightning.study.form import Study
from mm_lightning.study.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")

_WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => problems.push(event.blockedURI));
console.error = (...words) => problems.push(words.join(" "));
</script>"""


def _run(page: str, script: str, folder: Path) -> Any:
    """Open a page in a headless browser and return what ``script``, the body of an async function, returns."""
    report = (
        f"(async () => {{ {script} }})().catch(String).then((r) => document.body.dataset.result = JSON.stringify(r));"
    )
    path = folder / "tried.html"
    path.write_text(page.replace("</body>", f"<script>{report}</script></body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]
    command = [BROWSER or "", *options, f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(folder)},
    )
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found, f"The script gave no result.\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


def test_player_moves_by_slider_and_button(study: Study, tmp_path: Path):
    (player,) = study["experiments"][0]["players"]
    player["labels"] = ["<b>epoch</b> 1", "epoch 2", 'epoch "3"']
    page = write_report(study, tmp_path).read_text(encoding="utf-8").replace("<head>", "<head>" + _WATCH)
    script = """
      const player = document.querySelector(".player"), frames = [...player.querySelectorAll("img")];
      const slider = player.querySelector("input"), button = player.querySelector(".controls button");
      const wait = (time) => new Promise((resolve) => setTimeout(resolve, time));
      const state = () => [
        frames.flatMap((frame, i) => (frame.getClientRects().length && frame.naturalWidth === 4 ? [i] : [])),
        Number(slider.value), player.querySelector("output").textContent, button.getAttribute("aria-label"),
      ];
      const move = (index) => { slider.value = index; slider.dispatchEvent(new Event("input")); };
      await wait(100);
      const states = [state()];
      move(0); states.push(state());
      move(2); button.click(); states.push(state());  // from the last frame: starts again
      await wait(600); states.push(state());
      button.click(); await wait(2000); states.push(state());  // paused
      button.click(); await wait(2000); states.push(state());  // to the end
      button.click(); await wait(600); move(1); await wait(2000); states.push(state());  // the slider stops it
      return {states, spoken: slider.getAttribute("aria-valuetext"), problems: window.problems};
    """
    got = _run(page, script, tmp_path)
    first, second, third = [([k], k, label) for k, label in enumerate(player["labels"])]
    assert got["problems"] == []
    assert [tuple(state) for state in got["states"]] == [
        (*third, "Play"),
        (*first, "Play"),
        (*first, "Pause"),
        (*second, "Pause"),
        (*second, "Play"),
        (*third, "Play"),
        (*second, "Play"),
    ]
    assert got["spoken"] == "epoch 2"


def test_pictures_enlarge_and_commands_are_copied(study: Study, tmp_path: Path):
    page = write_report(study, tmp_path).read_text(encoding="utf-8").replace("<head>", "<head>" + _WATCH)
    script = """
      let copied = null;
      Object.defineProperty(navigator, "clipboard", {value: {writeText: async (text) => { copied = text; }}});
      const [button] = document.querySelectorAll(".copy");
      button.click();
      await new Promise((resolve) => setTimeout(resolve, 100));
      const pressed = button.textContent;
      const dialog = document.querySelector("dialog"), card = document.querySelector("button.card");
      const states = [dialog.open];
      card.click();
      states.push(dialog.open, dialog.querySelector("img").src === card.querySelector("img").src);
      dialog.querySelector("button").click();
      return {copied, pressed, states: [...states, dialog.open], problems: window.problems};
    """
    got = _run(page, script, tmp_path)
    assert got == {
        "copied": "draw a\ndraw b",
        "pressed": "Copied",
        "states": [False, True, True, False],
        "problems": [],
    }


def test_a_narrow_screen_scrolls_tables_not_the_page(study: Study, tmp_path: Path):
    (experiment,) = study["experiments"]
    experiment["pictures"][0]["commands"] = ["python -m mm_lightning.train " + "a" * 200]
    page = write_report(study, tmp_path).read_text(encoding="utf-8").replace("<details", "<details open")
    # a window has a least width, a frame has none
    frame = f'<iframe width="360" height="800" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
    script = """
      await new Promise((resolve) => setTimeout(resolve, 500));
      const inner = document.querySelector("iframe").contentWindow, root = inner.document.documentElement;
      const tables = [...inner.document.querySelectorAll(".scroll")].map((box) => box.scrollWidth > box.clientWidth);
      return {window: inner.innerWidth, overflow: root.scrollWidth - root.clientWidth, tables};
    """
    got = _run(f"<!DOCTYPE html><body>{frame}</body>", script, tmp_path)
    assert (got["window"], got["overflow"]) == (360, 0)
    assert got["tables"][0]
