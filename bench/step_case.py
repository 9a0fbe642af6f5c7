"""What a step is measured on: shapes, lengths, random weights, and how much of it has to be computed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from advgame.game.pairs import Pair
from advgame.game.tree import Sample
from advgame.learn.packing import pack

SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
             "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 512, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen2.5's shapes, less their depth; `tiny` is for trying the benchmark itself."""
DEPTHS = {"0.5b": 24, "7b": 28, "tiny": 2}
"""Layers of the models as they are published: never more."""

SEED = 20251220
LENGTHS = "prompts normal, mean 300, deviation 80; completions log-normal, median 300, sigma 0.6, at most 2048"
STATE_BYTES = 4 * 7 + 2
"""A parameter's weight, two moments, average, initial copy, gradient and gradient under way; its bf16 copy."""


@dataclass(frozen=True)
class Case:
    """One comparison. device: cpu, cuda, cuda:0; dtype: float32 or bfloat16, of the computation."""

    device: str
    size: str
    layers: int
    pairs: int
    dtype: str
    steps: int

    @property
    def gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def config(self) -> Qwen2Config:
        return config_of(self.size, self.layers)

    @property
    def lengths(self) -> str:
        return LENGTHS if self.gpu else f"{LENGTHS}, a quarter of each"


def config_of(size: str, layers: int) -> Qwen2Config:
    return Qwen2Config(**SHAPES[size], num_hidden_layers=layers, max_position_embeddings=32768)


def pairs_of(case: Case) -> list[Pair]:
    """Random tokens of the stated lengths; chosen and rejected share their prompt."""
    draw = random.Random(SEED)
    vocab, part = case.config.vocab_size, 1 if case.gpu else 4

    def ids(length: float) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(max(2, round(length / part))))

    def completion(prompt: tuple[int, ...]) -> Sample:
        tokens = ids(min(2048.0, math.exp(draw.gauss(math.log(300), 0.6))))
        return Sample(prompt, tokens, (0.0,) * len(tokens), "stop", 0)

    made = []
    for i in range(case.pairs):
        prompt = ids(max(16.0, draw.gauss(300, 80)))
        made.append(Pair(completion(prompt), completion(prompt), 1.0, 0.0, str(i)))
    return made


def model_of(case: Case) -> Qwen2ForCausalLM:
    """The same random weights in every process."""
    torch.manual_seed(0)
    with torch.device(case.device):
        return Qwen2ForCausalLM(case.config).eval()


def useful_flops(case: Case, pairs: Sequence[Pair]) -> float:
    """Forward and backward of what has to be computed: each prompt once, response rows in the head, no reference."""
    config = case.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    layer = width * (2 * width + 2 * head * config.num_key_value_heads) + 3 * width * config.intermediate_size
    tokens = rows = seen = 0
    for pair in pairs:
        batch = pack([pair.chosen, pair.rejected], share=True)
        tokens, rows = tokens + batch.tokens, rows + len(batch.labels)
        seen += sum(s.length * s.shared + s.length * (s.length + 1) // 2 for s in batch.spans)
    attention = 4 * width * seen
    return 3.0 * (config.num_hidden_layers * (2 * tokens * layer + attention) + 2 * rows * width * config.vocab_size)


def layers_that_fit(size: str, memory: int) -> int:
    """Layers whose state takes three fifths of `memory` bytes; the steps themselves need the rest."""
    config = config_of(size, 1)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    room = 0.6 * memory / STATE_BYTES
    return max(1, min(DEPTHS[size], int((room - (whole - layer)) // layer)))
