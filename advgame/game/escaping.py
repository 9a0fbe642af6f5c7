"""Makes foreign text safe to insert into a template: it can neither close our tags nor pose as a verdict.

A control tag is recognised as a careless reader (a language model) would see it: in any case, with spaces,
slashes or invisible characters strewn in, in full-width, mathematical, accented or look-alike letters, behind
a look-alike bracket, closed or not. Only its opening bracket is changed, to `&lt;`, so the text stays
readable; every other `<` stays as it is. Markers of chat formats (`<|im_start|>`, `<s>` and their kin) are
treated alike, since a tokenizer could turn them into special tokens. Double brackets (`«think»`) and letters
set apart by anything but white space are left alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

CONTROL_TAGS = frozenset(
    {
        "think",
        "prompt",
        "verdict",
        "score",
        "seed",
        "attack",
        "query",
        "answer",
        "answer_a",
        "answer_b",
        "message",
    }
)
"""Tags of the answer formats, of the verdicts, and those that the package's templates wrap material in."""

CHAT_TAGS = frozenset({"s", "bos", "eos", "start_of_turn", "end_of_turn", "im_start", "im_end"})

# Normalisation (NFKD) covers full-width, circled and mathematical forms; these are the look-alikes it leaves
# alone. Capitals are mapped before case folding: a capital Nu looks like N, its lower case like v.
_LOOKALIKES = str.maketrans(
    {
        **dict.fromkeys("‹〈⟨❬❮❰˂ᐸ⧼⦑", "<"),
        **dict.fromkeys("›〉⟩❭❯❱˃ᐳ⧽⦒", ">"),
        **dict.fromkeys("∕⁄╱⧸⟋⧵∖\\", "/"),
        **dict.fromkeys("ǀ∣❘│┃¦׀", "|"),
        **dict.fromkeys("‗⎯‐‑‒–—―−", "_"),
        **dict.fromkeys("\u2800\u3164\u115f\u1160\uffa0\u17b4\u17b5", " "),
        **dict(zip("АВЕКМНОРСТУХЅІЈ", "abekmhopctyxsij", strict=True)),
        **dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "abezhikmnoptyx", strict=True)),
        **dict(zip("авсԁеғһіјкмнопԛрѕтѵԝхуӏ", "abcdefhijkmhonqpstvwxyl", strict=True)),
        **dict(zip("αβγεικνορτυχɑɡıȷɩոսցհօѡ", "abyeikvoptuxagijinughow", strict=True)),
    }
)
_ASCII_ODD = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\\]")


@lru_cache(maxsize=65536)
def _plain(char: str) -> str:
    """What a character looks like in plain ASCII: "" for an invisible one, itself if it looks like none."""
    decomposed = unicodedata.normalize("NFKD", char).translate(_LOOKALIKES).casefold()
    kept = (c for c in decomposed if c.isspace() or unicodedata.category(c) not in {"Mn", "Me", "Cf", "Cc"})
    return "".join(kept).translate(_LOOKALIKES)


def _canonical(text: str) -> tuple[str, list[int] | None]:
    """The text as it looks, and for each of its characters the index of the origin (None: the same index)."""
    if text.isascii() and _ASCII_ODD.search(text) is None:
        return text.lower(), None
    parts: list[str] = []
    origin: list[int] = []
    for index, char in enumerate(text):
        plain = _plain(char)
        parts.append(plain)
        origin.extend([index] * len(plain))
    return "".join(parts), origin


@lru_cache(maxsize=64)
def _pattern(extra: frozenset[str]) -> re.Pattern[str]:
    # Possessive quantifiers (`*+`) never give back what they took, so matching is linear in the text.
    gap = r"[\s_.\-]*+"
    spread = [gap.join(r"\s*+".join(map(re.escape, word)) for word in tag.split("_")) for tag in CONTROL_TAGS | extra]
    any_score = r"\s*+".join("score") + gap + "[a-z0-9]"
    name = f"(?:{'|'.join(sorted([*spread, any_score]))})(?![a-z0-9])"
    # A bracket set off by white space (`if x < score`) is a tag only when a slash or a closing bracket says
    # so.
    tight, slashed, closed = f"/*+{name}", rf"\s*+/[\s/]*+{name}", rf"\s*+{name}[\s/]*+>"
    chat = rf"[\s/]*+(?:{'|'.join(sorted(CHAT_TAGS))})\s*+>"
    return re.compile(rf"<(?:\s*+\||{tight}|{slashed}|{closed}|{chat})")


def find_control_tags(text: str, extra: Iterable[str] = ()) -> list[int]:
    """Indices in `text` of the opening brackets of everything that looks like a control or chat tag.

    `extra` names further tags (lower case) to look for.
    """
    canonical, origin = _canonical(text)
    starts = [match.start() for match in _pattern(frozenset(extra)).finditer(canonical)]
    return starts if origin is None else list(dict.fromkeys(origin[start] for start in starts))


def escape(text: str, extra: Iterable[str] = ()) -> str:
    """`text`, the opening bracket of every control or chat tag written as `&lt;`. Idempotent, linear time."""
    pieces: list[str] = []
    start = 0
    for index in find_control_tags(text, extra):
        pieces += (text[start:index], "&lt;")
        start = index + 1
    return "".join([*pieces, text[start:]])
