"""Show which layers ``layers="auto"`` finds safe and chooses, in tiny networks of many families.

    python scripts/auto_layers.py

It prints the table of every network in tests/architectures.py and writes them to docs/auto_layers.md. Two networks
need ``transformers``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import mm_lightning  # noqa: E402
from tests.architectures import ARCHITECTURES  # noqa: E402

HEAD = """# What `layers="auto"` chooses

Tiny networks of many families, and what `mm_lightning.inspect(module, batch)` finds in each. Written by
`python scripts/auto_layers.py`; the networks are those of [tests/architectures.py](../tests/architectures.py).
"""


def main() -> None:
    """Print the tables, then write them."""
    sections = [HEAD]
    for architecture in ARCHITECTURES:
        table = str(mm_lightning.inspect(architecture.make(), architecture.batch()))
        print(f"{architecture.name}: {architecture.family}\n{table}\n")
        sections.append(f"## {architecture.name}\n\n{architecture.family}\n\n```\n{table}\n```\n")
    path = ROOT / "docs" / "auto_layers.md"
    path.write_text("\n".join(sections), encoding="utf-8")
    print(f"Written to {path.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
