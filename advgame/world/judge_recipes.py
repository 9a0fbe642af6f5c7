"""What the tiny world's language-model judge is taught and examined on: questions, and the rule's verdicts on them.

Queries are seeds and attacks of every framing, answers are of every kind, gibberish that is nearly an answer
included. One query in eight is reserved: training never sees it, the examination sees no other.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from advgame.game.judge import Key
from advgame.game.llm_judge import LLMJudge
from advgame.game.prompts import Templates
from advgame.game.tree import Rubric, Seed
from advgame.world.grammar import (
    INTENTS,
    Intent,
    ParsedPrompt,
    attacks,
    parse_prompt,
    read_answer,
    request,
    responses,
    words,
)
from advgame.world.judge import POINTS, rule_score
from advgame.world.lexicon import PARAPHRASES, PREFIXES, SUFFIXES
from advgame.world.recipes import other_object

RESERVED = 8
"""One query in this many is kept for the examination."""
PAIRS, POINTWISE = 0.45, 0.1
"""Shares of the questions; the rest ask whether an attack is faithful."""
PLAIN = 0.25
"""Share of queries that are a plain seed, as the Attacker's judge is asked them."""
TIES = 0.2
"""Share of comparisons between two equal answers: a Defender that has learnt answers everything alike."""
UNREADABLE = 0.03
"""Share of queries that are no prompt of the world."""


@dataclass(frozen=True)
class Question:
    """One question to a judge, by the number of its texts after the query: two answers, or one.

    rubric: None asks whether the one text, an attack, keeps the intent of the query, a seed.
    """

    rubric: Rubric | None
    query: str
    texts: tuple[str, ...]

    def turn(self, templates: Templates) -> str:
        """The user's turn that an LLM judge reads."""
        if self.rubric is None:
            return templates.faithful(self._seed, self.texts[0])
        if len(self.texts) == 2:
            return templates.pair(self.rubric, self.query, *self.texts)
        return templates.point(self.rubric, self.query, self.texts[0])

    def rule(self) -> tuple[float, ...] | bool:
        """The rule's verdict: a score for each answer, or whether the attack is faithful."""
        if self.rubric is None:
            wanted, found = parse_prompt(self.query), parse_prompt(self.texts[0])
            return wanted is not None and found is not None and wanted.intent == found.intent
        return tuple(rule_score(self.rubric, self.query, text) for text in self.texts)

    def hints(self, turn: str) -> list[str | None]:
        """What a careful reader expects after each word of `turn` (its own turn), None where there is nothing to know.

        Within a well-formed text: its next word. From the first word on that nothing well-formed begins with (in an
        answer to this query, in any attack, in the seed of this attack): "false". At the closing tag of an answer: its
        score; of an attack: whether it is one. These are taught beside the verdict, which by itself tells too seldom
        what was wrong where: in 600 steps without the next words, faithfulness was not learnt at all.
        """
        parts = turn.split()
        hints: list[str | None] = [None] * len(parts)
        prompt = parse_prompt(self.query)
        if self.rubric is None:
            attack = parse_prompt(self.texts[0])
            _expect(hints, parts, "attack", _all_openings(), str(attack is not None).lower())
            if attack is not None:
                _expect(hints, parts, "seed", _beginnings([request(attack.intent)], "seed"), str(self.rule()).lower())
            return hints
        if prompt is not None:
            _expect(hints, parts, "query", _beginnings([self.query], "query"), None)
            # nobody could guess the first word
            hints[parts.index("<query>")] = None
        tags = ("answer",) if len(self.texts) == 1 else ("answer_a", "answer_b")
        scores = self.rule()
        assert isinstance(scores, tuple), "answers are scored"
        for tag, score in zip(tags, scores, strict=True):
            _expect(hints, parts, tag, _answer_openings(None if prompt is None else prompt.intent, tag), f"{score:g}")
        return hints

    async def ask(self, judge: LLMJudge, key: Key) -> tuple[float, ...] | bool | None:
        """The same of an LLM judge; None if it gave no verdict."""
        if self.rubric is None:
            return await judge.faithful(self._seed, self.texts[0], key=key)
        if len(self.texts) == 2:
            return await judge.compare(self.rubric, self.query, *self.texts, key=key)
        score = await judge.score(self.rubric, self.query, self.texts[0], key=key)
        return None if score is None else (score,)

    @property
    def _seed(self) -> Seed:
        prompt = parse_prompt(self.query)
        assert prompt is not None, "faithfulness is asked of seeds"
        return Seed(self.query, prompt.intent.category, self.query)


Openings = frozenset[tuple[str, ...]]
"""The first words, one or more, of some texts; whole texts with a closing tag behind them too."""


def _expect(hints: list[str | None], parts: Sequence[str], tag: str, known: Openings, end: str | None) -> None:
    """Fills in the hints within one tag: next words while what was read is `known`, then "false"; `end` at its end."""
    start, stop = parts.index(f"<{tag}>"), parts.index(f"</{tag}>")
    read = tuple(parts[start + 1 : stop + 1])
    for i in range(len(read)):
        if i and read[:i] not in known:
            hints[start + i] = "false"
        elif read[: i + 1] in known:
            hints[start + i] = read[i]
    hints[stop] = end


def _beginnings(texts: Iterable[str], tag: str) -> Openings:
    whole = [(*text.split(), f"</{tag}>") for text in texts]
    return frozenset(words[:i] for words in whole for i in range(1, len(words) + 1))


@cache
def _all_openings() -> Openings:
    return _beginnings((prompt.text for intent in INTENTS for prompt in attacks(intent)), "attack")


@cache
def _answer_openings(intent: Intent | None, tag: str) -> Openings:
    found = [response for i in (INTENTS if intent is None else (intent,)) for response in responses(i)]
    return _beginnings((r.text for r in found if read_answer(r.text, intent).kind is r.kind), tag)


def verdict_text(verdict: tuple[float, ...] | bool) -> str:
    """A verdict in the form that the game reads (`parsing.py`), in the words of the judge's tokenizer."""
    if isinstance(verdict, bool):
        return f"<verdict> {str(verdict).lower()} </verdict>"
    tags = ("score",) if len(verdict) == 1 else ("score_A", "score_B")
    return " ".join(f"<{tag}> {score:g} </{tag}>" for tag, score in zip(tags, verdict, strict=True))


def score_words() -> tuple[str, ...]:
    """Every score that the rule gives, as a word: the rubrics' points and 0 for gibberish."""
    points = {score for rubric in POINTS.values() for score in vars(rubric).values()} | {0.0}
    return tuple(f"{score:g}" for score in sorted(points))


def draw_question(rng: random.Random, *, reserved: bool) -> Question:
    """A question for training, or (`reserved`) for the examination."""
    kind = rng.random()
    intent = rng.choice(INTENTS)
    if kind >= PAIRS + POINTWISE:
        return Question(None, request(intent), (_attack(rng, intent, reserved),))
    query = _query(rng, intent, reserved)
    rubric = rng.choice(list(Rubric))
    a = _answer(rng, intent)
    if kind < PAIRS:
        return Question(rubric, query, (a, a if rng.random() < TIES else _answer(rng, intent)))
    return Question(rubric, query, (a,))


def is_reserved(text: str) -> bool:
    """Whether a query (or an attack whose faithfulness is asked) is kept for the examination; no plain seed is."""
    if text in _plain():
        return False
    return zlib.crc32(text.encode()) % RESERVED == 0


@cache
def _plain() -> frozenset[str]:
    return frozenset(map(request, INTENTS))


def _query(rng: random.Random, intent: Intent, reserved: bool) -> str:
    if not reserved and rng.random() < PLAIN:
        return request(intent)
    while True:
        text = _framed(rng, intent)
        if rng.random() < UNREADABLE:
            text = _damaged(rng, text)
        if is_reserved(text) == reserved:
            return text


def _framed(rng: random.Random, intent: Intent) -> str:
    """Any framing, held-out ones too: the judge shall read every attack that the world knows."""
    places = (PREFIXES, PARAPHRASES, SUFFIXES)
    return ParsedPrompt(intent, *(rng.randrange(len(place)) for place in places)).text


def _attack(rng: random.Random, intent: Intent, reserved: bool) -> str:
    while True:
        fate = rng.random()
        told = intent
        if 0.45 <= fate < 0.75:
            # what untrained Attackers get wrong, and what trained ones would get away with
            told = other_object(rng, intent)
        elif 0.75 <= fate < 0.8:
            told = rng.choice(INTENTS)
        text = request(told) if rng.random() < PLAIN / 2 else _framed(rng, told)
        if fate >= 0.8:
            text = _damaged(rng, text)
        if is_reserved(text) == reserved:
            return text


def _answer(rng: random.Random, intent: Intent) -> str:
    """Well-formed (6 in 10), meant for another intent, damaged, made of two, or no answer at all."""
    fate = rng.random()
    if fate < 0.6:
        return rng.choice(responses(intent)).text
    if fate < 0.7:
        return rng.choice(responses(other_object(rng, intent))).text
    if fate < 0.77:
        return rng.choice(responses(rng.choice(INTENTS))).text
    if fate < 0.88:
        return _damaged(rng, rng.choice(responses(intent)).text)
    if fate < 0.93:
        head, tail = (rng.choice(responses(intent)).text.split() for _ in range(2))
        return _spliced(head, tail, rng.random())
    if fate < 0.97:
        return " ".join(rng.choices(_words(), k=rng.randint(1, 14)))
    return _framed(rng, intent)


def _spliced(head: Sequence[str], tail: Sequence[str], at: float) -> str:
    """One answer's beginning and another's end: "no , take the console and stop the witness"."""
    return " ".join([*head[: 1 + int(at * (len(head) - 1))], *tail[1 + int(at * (len(tail) - 1)) :]])


def _damaged(rng: random.Random, text: str) -> str:
    """A text with one thing wrong (or, seldom, two), as a model gets it that is losing its language."""
    parts = text.split()
    for _ in range(2 if rng.random() < 0.2 else 1):
        parts = _once_damaged(rng, parts)
    return " ".join(parts)


def _once_damaged(rng: random.Random, parts: Sequence[str]) -> list[str]:
    made, at = list(parts), rng.randrange(len(parts))
    match rng.randrange(7):
        case 0 if len(made) > 1:
            del made[at]
        case 1:
            made.insert(at, made[at])
        case 2:
            made = made[: at + 1]
        case 3:
            other = rng.randrange(len(made))
            made[at], made[other] = made[other], made[at]
        case 4:
            # a word that answers do hold, of another verb: the tool, the action, the noun or the topic
            made[at] = rng.choice(rng.choice(responses(rng.choice(INTENTS))).text.split())
        case 5:
            made += rng.choice(responses(rng.choice(INTENTS))).text.split()
        case _:
            made[at] = rng.choice(_words())
    return made


@cache
def _words() -> tuple[str, ...]:
    """The world's words, and one that no tokenizer of the world knows: a tag, which templates disarm."""
    return (*words(), "&lt;think>")
