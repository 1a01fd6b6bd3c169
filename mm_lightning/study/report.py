"""One page that shows a study: verdicts, pictures, tables, and the commands behind each of them."""

from __future__ import annotations

import base64
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ImportError as error:
    raise ImportError("Reports are written with jinja2: pip install 'mm-lightning[report]'.") from error

from mm_lightning.files import whole_file
from mm_lightning.study.form import Player, Study
from mm_lightning.study.tables import CHART_HEIGHT, claims, count, tables

__all__ = ["write_report"]

_MEDIA_TYPES = {".png": "png", ".gif": "gif", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def write_report(study: Study, folder: Path) -> Path:
    """Write a study as one HTML page that needs neither a network nor other files, whole or not at all.

    At the top stands a verdict for each claim; then, for each experiment, its pictures, the exact commands that make
    them, and a table per schedule, where each cell has the mean, the standard deviation and a dot per seed.

    Args:
        study: The results, as read from ``metrics.json``; :mod:`mm_lightning.study.form` describes the form.
        folder: The study's folder. The pictures that ``study`` names lie below it and are embedded in the page.

    Returns:
        Path of the page, ``folder / "index.html"``.

    Raises:
        FileNotFoundError: If a picture is missing.
        ValueError: If the form is of another version, a picture is of a kind that pages do not show, a name is used
            that was not introduced, a verdict's measure has no direction, or a player's labels and files do not match.
        OSError: If the page cannot be written; an older one is left as it was.
    """
    if study["format"] != 2:
        raise ValueError(f"study has format {study['format']!r}, expected 2. Run the study again with this version.")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "date": _date, "duration": _duration}
    experiments = study["experiments"]
    page = environment.get_template("report.html.jinja").render(
        study=study,
        outcomes=Counter(verdict["verdict"] for experiment in experiments for verdict in experiment["verdicts"]),
        claims={experiment["name"]: claims(experiment) for experiment in experiments},
        tables={experiment["name"]: tables(experiment) for experiment in experiments},
        chart_height=CHART_HEIGHT,
        embed=lambda file: _data_uri(folder, file),
        frames=lambda player: _frames(folder, player),
    )
    path = folder / "index.html"
    with whole_file(path) as file:
        file.write(page.encode())
    return path


def _data_uri(folder: Path, file: str) -> str:
    path = folder / file
    if path.suffix.lower() not in _MEDIA_TYPES:
        raise ValueError(f"Picture {file!r} cannot be embedded. Save it as one of {', '.join(_MEDIA_TYPES)}.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"The study names the picture {file!r}, which is not in {folder}. Draw it first."
        ) from None
    return f"data:image/{_MEDIA_TYPES[path.suffix.lower()]};base64,{base64.b64encode(content).decode()}"


def _frames(folder: Path, player: Player) -> list[tuple[str, str]]:
    labels, files = player["labels"], player["files"]
    if not files or len(labels) != len(files):
        raise ValueError(
            f"Player {player['title']!r} needs a label for each file and one file at least, got {len(labels)} labels "
            f"and {len(files)} files."
        )
    return [(label, _data_uri(folder, file)) for label, file in zip(labels, files, strict=True)]


def _date(text: str) -> str:
    moment = datetime.fromisoformat(text).astimezone(timezone.utc)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
