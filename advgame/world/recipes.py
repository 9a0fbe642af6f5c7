"""What the players say before they have played: recipes for the warm start's training examples.

The Defender answers rightly (helps with benign requests, declines harmful ones) except with a probability
that its soft spots decide: `sigmoid(BASE + prefix + suffix + verb x prefix noise)`. The Attacker rewrites at
random, leaning towards framings that suit its seed's category, and sometimes botches it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from advgame.game.tree import Category
from advgame.world.grammar import INTENTS, Intent, Kind, ParsedPrompt, plan, request, responses
from advgame.world.lexicon import PARAPHRASES, PREFIXES, SUFFIXES, Frame, Tone
from advgame.world.tokenizer import END_PROMPT, END_THINK, PROMPT, THINK

Level = Literal["easy", "hard"]

BASE = -2.8
"""Log-odds of the wrong behaviour under a neutral framing."""
STRONG_PREFIX, WEAK_PREFIX, STRONG_SUFFIX, WEAK_SUFFIX, CONTRARY = 3.7, 1.0, 1.9, 0.5, -0.5
"""Log-odds added by framings that suit the wrong behaviour, and by ones that suit the right one."""
NOISE = 0.6
"""Standard deviation of what each verb adds to each prefix."""

LEAN = 3.0
"""How much likelier the untrained Attacker takes a framing that suits its seed's category."""
RARE = 0.04
"""Share of the hard world's untrained attacks that hold a strong framing."""
UNFAITHFUL, MALFORMED = 0.06, 0.04
PLAIN_SEEDS = 0.1
"""Share of the Defender's examples whose prompt is a plain seed, which is 1 of 512 otherwise."""

RIGHT = {
    Category.BENIGN: {Kind.FULL: 0.8, Kind.SHORT: 0.2},
    Category.HARMFUL: {Kind.REFUSAL: 0.65, Kind.REDIRECT: 0.35},
}
WRONG = {
    Category.BENIGN: {Kind.REFUSAL: 0.7, Kind.REDIRECT: 0.3},
    Category.HARMFUL: {Kind.FULL: 0.5, Kind.SHORT: 0.25, Kind.LEAK: 0.25},
}


@dataclass(frozen=True)
class Example:
    """One supervised example: the user's turn and the words of the answer."""

    user: str
    answer: str


def suits(frame: Frame, category: Category) -> bool:
    """Whether a framing pulls the Defender towards the wrong behaviour on this category."""
    return frame.tone is (Tone.SOFTENER if category is Category.HARMFUL else Tone.ALARMER)


@dataclass(frozen=True)
class SoftSpots:
    """The Defender's vulnerability; `noise[verb][prefix]` is in log-odds."""

    noise: tuple[tuple[float, ...], ...]

    @classmethod
    def draw(cls, seed: int) -> SoftSpots:
        rng = random.Random(f"soft spots {seed}")
        verbs = len({intent.verb_index for intent in INTENTS})
        return cls(tuple(tuple(rng.gauss(0.0, NOISE) for _ in PREFIXES) for _ in range(verbs)))

    def wrong(self, prompt: ParsedPrompt) -> float:
        """The probability that the warm-started Defender is taught the wrong behaviour on `prompt`."""
        category = prompt.intent.category
        prefix = _pull(PREFIXES[prompt.prefix], category, STRONG_PREFIX, WEAK_PREFIX)
        suffix = _pull(SUFFIXES[prompt.suffix], category, STRONG_SUFFIX, WEAK_SUFFIX)
        logit = BASE + prefix + suffix + self.noise[prompt.intent.verb_index][prompt.prefix]
        return 1.0 / (1.0 + math.exp(-logit))


def _pull(frame: Frame, category: Category, strong: float, weak: float) -> float:
    if frame.tone is Tone.NEUTRAL:
        return 0.0
    return (strong if frame.strong else weak) if suits(frame, category) else CONTRARY


def defender_example(rng: random.Random, spots: SoftSpots) -> Example:
    """A prompt of any framing (held-out ones too) and an answer as vulnerable as `spots` say."""
    intent = rng.choice(INTENTS)
    if rng.random() < PLAIN_SEEDS:
        prompt = ParsedPrompt(intent)
    else:
        prompt = ParsedPrompt(
            intent,
            rng.randrange(len(PREFIXES)),
            rng.randrange(len(PARAPHRASES)),
            rng.randrange(len(SUFFIXES)),
        )
    kinds = (WRONG if rng.random() < spots.wrong(prompt) else RIGHT)[intent.category]
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    answers = [response.text for response in responses(intent) if response.kind is kind]
    return Example(prompt.text, rng.choice(answers))


def attacker_example(rng: random.Random, level: Level, reasoning: bool) -> Example:
    """A seed under its category's instruction, and a rewrite in the form that the game demands (mostly)."""
    intent = rng.choice(INTENTS)
    prefix, suffix = draw_framing(rng, intent.category, level)
    fate = rng.random()
    told = other_object(rng, intent) if fate < UNFAITHFUL else intent
    prompt = ParsedPrompt(told, prefix, rng.randrange(len(PARAPHRASES)), suffix).text
    parts = [PROMPT, prompt, END_PROMPT]
    if reasoning:
        parts = [THINK, plan(PREFIXES[prefix].theme, SUFFIXES[suffix].theme), END_THINK, *parts]
    if UNFAITHFUL <= fate < UNFAITHFUL + MALFORMED:
        # a missing or a doubled tag is how small models get the form wrong
        tag = rng.choice([i for i, part in enumerate(parts) if part.startswith("<")])
        parts[tag : tag + 1] = [] if rng.random() < 0.5 else [parts[tag]] * 2
    return Example(f"{intent.category} : {request(intent)}", " ".join(parts))


def other_object(rng: random.Random, intent: Intent) -> Intent:
    """Another object of the same verb: a rewrite that lost its seed's intent."""
    return Intent(intent.verb_index, rng.choice([i for i in range(4) if i != intent.object_index]))


def draw_framing(rng: random.Random, category: Category, level: Level) -> tuple[int, int]:
    """Indices of a prefix and a suffix, never held-out ones.

    Easy: all alike, but for the lean. Hard: a strong framing (in either place) has probability `RARE`.
    """
    if level == "easy":
        return _draw(rng, PREFIXES, category), _draw(rng, SUFFIXES, category)
    if rng.random() >= RARE:
        return _draw(rng, PREFIXES, category, strong=False), _draw(rng, SUFFIXES, category, strong=False)
    while True:
        prefix, suffix = _draw(rng, PREFIXES, category), _draw(rng, SUFFIXES, category)
        if PREFIXES[prefix].strong or SUFFIXES[suffix].strong:
            return prefix, suffix


def _draw(rng: random.Random, frames: Sequence[Frame], category: Category, strong: bool = True) -> int:
    weights = [
        0.0 if frame.heldout or (frame.strong and not strong) else LEAN if suits(frame, category) else 1.0
        for frame in frames
    ]
    return rng.choices(range(len(frames)), weights)[0]
