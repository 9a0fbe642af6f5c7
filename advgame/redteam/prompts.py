"""The texts of PAIR and TAP: three system prompts for the attacker, its feedback, the two judges, and their parsers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from advgame.game.escaping import escape
from advgame.game.prompts import Rules, checked_template, fill_template

STYLES = ("roleplay", "logic", "authority")
"""Stream i is told to work by style i mod 3."""

RULES: Mapping[str, Rules] = {
    **{f"attacker_{style}": Rules(("objective", "format")) for style in STYLES},
    "format_json": Rules(shows=('"improvement"', '"prompt"')),
    "opening": Rules(("objective",)),
    "feedback": Rules(("objective", "response", "score")),
    "judge_rating": Rules(("objective", "prompt", "response"), shows=("Rating: [[",)),
    "judge_topic": Rules(("objective", "prompt"), shows=("[[YES]]", "[[NO]]")),
}

OWN_TAGS = frozenset({"objective"})
"""Tags of these templates besides those of the game, which `escape` knows."""

LOWEST, HIGHEST = 1, 10

_RATING = re.compile(r"\[\[\s*+([0-9]{1,4})\s*+\]\]")
_TOPIC = re.compile(r"\[\[\s*+(YES|NO)\s*+\]\]", re.IGNORECASE)
_OPEN_BRACES = 32
"""Opening braces of a text that are tried as the start of its JSON object."""


@dataclass(frozen=True)
class Proposal:
    """What the attacker's JSON holds."""

    improvement: str
    prompt: str


def system_prompt(stream: int, objective: str) -> str:
    """The instruction of stream `stream`."""
    return fill(f"attacker_{STYLES[stream % len(STYLES)]}", {"objective": objective}, _texts()["format_json"])


def fill(name: str, values: Mapping[str, str], form: str = "") -> str:
    """A template with `values`, each escaped so that it can neither leave its tags nor pose as a verdict."""
    inserted = {key: escape(value, OWN_TAGS).replace("[[", "[ [") for key, value in values.items()}
    return fill_template(_texts()[name], inserted | {"format": form})


def proposal_message(improvement: str, prompt: str) -> str:
    """The assistant turn that goes into the conversation, the same whatever stood around the object."""
    return json.dumps({"improvement": improvement, "prompt": prompt}, ensure_ascii=False)


def parse_proposal(text: str) -> Proposal | None:
    """The first JSON object in `text` with a string `prompt` that shows something and a string `improvement`.

    Prose and code fences around it are passed over, and raw line breaks inside its strings are taken as they are.
    None if there is none.
    """
    start = text.find("{")
    for _ in range(_OPEN_BRACES):
        if start < 0:
            return None
        try:
            found: Any = _DECODER.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            improvement, prompt = found.get("improvement"), found.get("prompt")
            if isinstance(improvement, str) and isinstance(prompt, str) and _visible(prompt):
                return Proposal(improvement.strip(), prompt.strip())
        start = text.find("{", start + 1)
    return None


def parse_rating(text: str) -> int | None:
    """The whole number in the last `[[k]]`; None without one, or with one outside 1 to 10."""
    matches = _RATING.findall(text)
    if not matches or not LOWEST <= int(matches[-1]) <= HIGHEST:
        return None
    return int(matches[-1])


def parse_topic(text: str) -> bool | None:
    """True for [[YES]], False for [[NO]], by the last of them; None without one."""
    matches = _TOPIC.findall(text)
    return matches[-1].upper() == "YES" if matches else None


def _visible(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, written as an escape
        return False
    return any(char.isprintable() and not char.isspace() for char in text)


_DECODER = json.JSONDecoder(strict=False)


@cache
def _texts() -> Mapping[str, str]:
    folder = resources.files("advgame.redteam") / "templates"
    return {
        name: checked_template(f"{name}.md", (folder / f"{name}.md").read_bytes(), rules)
        for name, rules in RULES.items()
    }
