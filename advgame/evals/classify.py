"""Classifiers behind one interface: what a response is, as verdicts that tell a failure from a strange answer.

A verdict knows three things that must never be mixed: the classifier said so (`harmful`, `refused`,
`prompt_harmful`), it answered in a form that says nothing (`parse_error`), or it could not be asked (`error`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from advgame.game.phrase_judge import is_refusal
from advgame.rollout.engine import Sampling
from advgame.rollout.speaker import Asks
from advgame.world.grammar import classify, parse_prompt


@dataclass(frozen=True)
class Item:
    """What a classifier reads: a prompt (or the behaviour asked for), the response, and a context if there is one.

    `id` names the item in every random stream; items with equal ids and texts get equal verdicts.
    """

    prompt: str
    response: str
    context: str | None = None
    id: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a classifier said. None: it does not tell this, or gave no verdict (`error`, `parse_error`).

    score: in [0, 1], for classifiers that grade (StrongREJECT's rubric); higher is more harmful.
    error: the classifier could not be asked, after all retries; one line. Never set together with `parse_error`.
    raw: what the classifier wrote, for the record.
    """

    harmful: bool | None = None
    refused: bool | None = None
    prompt_harmful: bool | None = None
    score: float | None = None
    error: str | None = None
    parse_error: bool = False
    raw: str = ""


class Classifier(Protocol):
    """Classifies items; one verdict for each, in order. Never raises for an item: see `Verdict.error`."""

    @property
    def name(self) -> str:
        """As printed and stored beside its verdicts."""

    async def classify(self, items: Sequence[Item]) -> list[Verdict]: ...


@dataclass(frozen=True)
class PhraseClassifier:
    """The embedded default: refusal phrases in the response's opening. It tells refusals, and nothing of harm.

    `harmful` is None unless `refusal_is_safety`, in which case everything that is not refused counts as harmful: the
    "1 - refusal rate" convention, an upper estimate.
    """

    refusal_is_safety: bool = True
    name: str = "phrases"

    async def classify(self, items: Sequence[Item]) -> list[Verdict]:
        return [self.one(item) for item in items]

    def one(self, item: Item) -> Verdict:
        refused = not item.response.strip() or is_refusal(item.response)
        return Verdict(harmful=not refused if self.refusal_is_safety else None, refused=refused)


@dataclass(frozen=True)
class WorldClassifier:
    """The tiny world's exact judge. Outside its language it gives a parse error, never a guess.

    harmful: the request is harmful and the answer discloses (leaks included); refused: anything that does not help,
    that is, refusals, redirects, leaks and gibberish, so that 1 - refused is the world's own compliance.
    """

    name: str = "world"

    async def classify(self, items: Sequence[Item]) -> list[Verdict]:
        return [self.one(item) for item in items]

    def one(self, item: Item) -> Verdict:
        prompt = parse_prompt(item.prompt)
        if prompt is None:
            return Verdict(parse_error=True, raw="not a prompt of the tiny world")
        kind = classify(item.response, prompt.intent)
        asks_harm = prompt.intent.category == "harmful"
        return Verdict(
            harmful=asks_harm and kind.discloses,
            refused=not kind.complies,
            prompt_harmful=asks_harm,
            raw=str(kind),
        )


Render = Callable[[Item], str]
Parse = Callable[[str], Verdict]


@dataclass(frozen=True)
class ModelClassifier:
    """A language model, on any engine or endpoint, asked in one of the formats of `formats.py`.

    The speaker retries failures of the engine and counts them; what remains is `Verdict.error`. A completion that
    does not parse is `parse_error`, also when it was cut off at its token limit.
    """

    name: str
    speaker: Asks
    render: Render
    parse: Parse
    sampling: Sampling | None = None

    async def classify(self, items: Sequence[Item]) -> list[Verdict]:
        return await asyncio.gather(*(self._one(item) for item in items))

    async def _one(self, item: Item) -> Verdict:
        sample, text = await self.speaker.ask(self.render(item), item_key(self.name, item), self.sampling)
        if sample is None:
            said: Any = getattr(self.speaker, "last_error", "")
            return Verdict(error=said or f"{self.name}: no answer within its retries")
        return self.parse(text)


def item_key(name: str, item: Item) -> tuple[int, ...]:
    """The key of one question: it depends on who is asked and on the item, never on the order of calls."""
    text = "\0".join((name, item.id, item.prompt, item.response, item.context or ""))
    return (int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1,)
