"""Reads what the players and the judge wrote: attacks and responses strictly, verdicts by their last match.

Every function takes time linear in the text, whatever the text is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

# Sixteen digits on either side are more than a score needs, and keep `float` away from megabytes of them.
# Possessive quantifiers (`*+`) never give back what they took: no text makes these patterns backtrack.
_NUMBER = r"[+-]?(?:[0-9]{1,16}(?:\.[0-9]{0,16})?|\.[0-9]{1,16})"
_SCORES = {
    tag: re.compile(rf"<{tag}>\s*+({_NUMBER})\s*+</{tag}>", re.IGNORECASE | re.ASCII)
    for tag in ("score", "score_A", "score_B")
}
_VERDICT = re.compile(r"<verdict>\s*+(true|false)\s*+</verdict>", re.IGNORECASE | re.ASCII)

LOWEST, HIGHEST = 0.0, 10.0


def parse_attack(text: str, *, reasoning: bool) -> str | None:
    """The prompt of an attack, or None.

    The whole text must be `<think>…</think>` then `<prompt>…</prompt>` (without `reasoning`: the latter
    alone), with nothing but white space around them. Any further one of these tags, in any case, makes it
    None, and so does a prompt without a visible character.
    """
    rest = text.strip()
    if not _tags_once(rest, ("prompt", "think") if reasoning else ("prompt",), ("prompt", "think")):
        return None
    if reasoning:
        after = _after_thinking(rest)
        if after is None:
            return None
        rest = after.lstrip()
    if not (rest.startswith("<prompt>") and rest.endswith("</prompt>")):
        return None
    return _visible(rest[len("<prompt>") : -len("</prompt>")])


def parse_response(text: str, *, reasoning: bool) -> str | None:
    """The answer in a response, stripped, or None when it has no visible character.

    With `reasoning` the text must be `<think>…</think>` and then the answer, with no further think tag in any
    case.
    """
    if not reasoning:
        return _visible(text)
    rest = text.strip()
    if not _tags_once(rest, ("think",), ("think",)):
        return None
    after = _after_thinking(rest)
    return None if after is None else _visible(after)


def after_reasoning(text: str) -> str:
    """What a reader is shown of a response: what follows its reasoning block, stripped; without a block, all of it.

    The block ends at the first `</think>`. It begins with the text, spelt out (`<think>`) or by the chat template, so
    that no `<think>` stands before the end. A block that never ends leaves "": the answer did not begin.
    """
    before, closing, after = text.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if closing and (opened or "<think>" not in before):
        return after.strip()
    return "" if opened else text


def parse_scores(text: str) -> tuple[float, float] | None:
    """The scores of A and B, clipped to 0..10; None when either is missing.

    For each the last well-formed match in the whole text counts, inside a reasoning block or not: a later tag
    that holds no number does not undo an earlier score.
    """
    a, b = _last_score(text, "score_A"), _last_score(text, "score_B")
    return None if a is None or b is None else (a, b)


def parse_score(text: str) -> float | None:
    """The score of a single answer, clipped to 0..10; the last well-formed match in the whole text counts."""
    return _last_score(text, "score")


def parse_verdict(text: str) -> bool | None:
    """True or false; the last well-formed match in the whole text counts, inside a reasoning block or not."""
    last = _last(_VERDICT.finditer(text))
    return None if last is None else last.lower() == "true"


def _tags_once(text: str, once: tuple[str, ...], known: tuple[str, ...]) -> bool:
    lowered = text.lower()
    return all(lowered.count(f"<{slash}{tag}>") == (tag in once) for tag in known for slash in ("", "/"))


def _after_thinking(text: str) -> str | None:
    if not text.startswith("<think>"):
        return None
    _, closing, after = text.partition("</think>")
    return after if closing else None


def _visible(text: str) -> str | None:
    """The stripped text, or None if a reader would see nothing of it (white space, zero-width characters)."""
    stripped = text.strip()
    return stripped if any(char.isprintable() and not char.isspace() for char in stripped) else None


def _last(matches: Iterator[re.Match[str]]) -> str | None:
    last: str | None = None
    for match in matches:
        last = match[1]
    return last


def _last_score(text: str, tag: str) -> float | None:
    last = _last(_SCORES[tag].finditer(text))
    if last is None:
        return None
    value = float(last)
    return min(max(value, LOWEST), HIGHEST) if math.isfinite(value) else None
