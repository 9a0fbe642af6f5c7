"""Writes docs/settings.md from the settings themselves: scripts/settings-reference.py [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

from advgame.config import Config, describe_fields

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Written by `scripts/settings-reference.py`; the same list is printed by `advgame config --fields`. On the command line a
setting is `--section.field value`; in a YAML file it is a key of its section.
"""


def page() -> str:
    """The page as Markdown: one table a section."""
    lines = [HEAD]
    for path, default, meaning in describe_fields(Config):
        if default == "(section)" or path == "world":
            lines += ["", f"## {path}", "", meaning, "", "| setting | default | meaning |", "|---|---|---|"]
            continue
        cells = (f"`{path}`", f"`{default}`" if default else "", meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page() and f"{PAGE.name} is out of date; run {sys.argv[0]}")
    PAGE.write_text(page(), encoding="utf-8")
