"""Tables that several scripts write into one page."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def between_marks(page: str, name: str, text: str) -> str:
    """The page with the text between the marks of that name.

    Raises:
        ValueError: If the page has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if begin not in page or end not in page:
        raise ValueError(f"The page has no place for {name!r}: {begin.strip()} ... {end.strip()}.")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{text}{end}", page, flags=re.DOTALL)
