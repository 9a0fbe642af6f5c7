"""Who plays in `bench play`: engines told how long to answer, words instead of a tokenizer, a judge that hashes."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from advgame.game.judge import Key
from advgame.game.prompts import Templates
from advgame.game.tree import Attack, Category, Rubric, Sample, Seed, Tree
from advgame.rollout.engine import Request, stream_seed
from advgame.rollout.speaker import Speaker
from advgame.rollout.vllm_engine import VllmEngine

VOCABULARY, SEED = 256, 0
PROMPT, DEVIATION = 75.0, 20.0
"""Tokens of the Attacker's prompts: a quarter of 300 and 80."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal tokens of a completion, cut at `most`."""

    median: float
    sigma: float
    most: int

    def of(self, key: Key) -> int:
        drawn = random.Random(f"length {SEED} {key}").gauss(math.log(self.median), self.sigma)
        return max(1, min(self.most, round(math.exp(drawn))))


class Given:
    """An engine whose requests run exactly as long as `lengths` says, and then count as ended by themselves."""

    version = 0

    def __init__(self, engine: VllmEngine, lengths: Lengths):
        self.engine, self.lengths = engine, lengths

    async def generate(self, request: Request) -> Sample:
        sampling = replace(request.sampling, max_tokens=self.lengths.of(request.key))
        return replace(await self.engine.generate(replace(request, sampling=sampling)), finish_reason="stop")


class Words:
    """A chat format: numbers are token ids; of the other words (templates) every fourth is one, by its hash."""

    def __init__(self, frame: str = "{}"):
        self.frame = frame

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        ids = []
        for place, word in enumerate(user.split()):
            if word.isdigit():
                ids.append(int(word) % VOCABULARY)
            elif place % 4 == 0:
                ids.append(_hash(word) % VOCABULARY)
        return tuple(ids)

    def text(self, token_ids: Sequence[int]) -> str:
        return self.frame.format(" ".join(map(str, token_ids)))


class HashJudge:
    """Asks its engine in the words of the templates, waits for the tokens, and reads a verdict out of their hash."""

    def __init__(self, speaker: Speaker, templates: Templates):
        self.speaker, self.templates = speaker, templates

    async def faithful(self, seed: Seed, prompt: str, *, key: Key) -> bool | None:
        return (await self._number(self.templates.faithful(seed, prompt), key)) % 10 > 0

    async def compare(self, rubric: Rubric, query: str, a: str, b: str, *, key: Key) -> tuple[float, float] | None:
        number = await self._number(self.templates.pair(rubric, query, a, b), key)
        return number % 11 / 1.0, number // 11 % 11 / 1.0

    async def score(self, rubric: Rubric, query: str, answer: str, *, key: Key) -> float | None:
        return (await self._number(self.templates.point(rubric, query, answer), key)) % 11 / 1.0

    async def _number(self, text: str, key: Key) -> int:
        _, said = await self.speaker.ask(text, key)
        return _hash(said)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def without_logprobs(tree: Tree) -> Tree:
    """What must be equal: tokens, verdicts, structure. Log-probs round as the batch happened to be."""

    def bare(sample: Sample | None) -> Sample | None:
        return None if sample is None else replace(sample, logprobs=())

    def attack(one: Attack) -> Attack:
        responses = tuple(replace(r, sample=bare(r.sample)) for r in one.responses)
        return replace(one, sample=bare(one.sample), responses=responses)

    return replace(tree, attacks=tuple(map(attack, tree.attacks)))


MODELS = {"0.1m": (64, 2), "25m": (512, 8)}
"""Width and layers. In the small one a row of a decoding step costs what vLLM spends on a row; the large one's weights
do not fit a core's caches, so that a step costs about the same for one row and for some, as on a GPU."""


def model_folder(folder: Path, positions: int, size: str) -> Path:
    """A random Qwen2 of one of MODELS, saved."""
    width, layers = MODELS[size]
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=2, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def seeds_of(count: int, templates: Templates) -> list[Seed]:
    """Seeds of random numbers, harmful and benign by turns, with which the Attacker's prompts are normal: PROMPT tokens
    in the mean, with DEVIATION. The template's own words count, so that a seed has at least four."""
    made, words = [], Words()
    for i in range(count):
        category = tuple(Category)[i % 2]
        wanted = random.Random(f"prompt {SEED} {i}").gauss(PROMPT, DEVIATION)
        bare = len(words.prompt_ids(templates.attacker(Seed(str(i), category, "0")))) - 1
        length = max(4, round(wanted) - bare)
        text = " ".join(str(stream_seed(SEED, (i, w)) % VOCABULARY) for w in range(length))
        made.append(Seed(str(i), category, text))
    return made
