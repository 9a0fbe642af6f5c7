"""Makes one player of the tiny world from random weights by supervised learning, in a process of its own.

Run as `python -m advgame.world.training ROLE SETTINGS_JSON FOLDER`; `warmstart.py` does. Every step prints
"step loss" on a line, and at the end FOLDER is a Hugging Face model folder with the tokenizer.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from advgame.world.recipes import Example, SoftSpots, attacker_example, defender_example
from advgame.world.settings import WorldSettings
from advgame.world.tokenizer import build_tokenizer, chat

POSITIONS = 256
HEAD = 32
WARM_UP = 50
IGNORED = -100


class PlayerRole(StrEnum):
    """Whom to make; SHARED learns both roles' examples (one model for Self-RedTeam). JUDGE: `judge_training.py`."""

    ATTACKER = "attacker"
    DEFENDER = "defender"
    SHARED = "shared"
    JUDGE = "judge"


def new_model(settings: WorldSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights: fp32, tied embeddings, heads 32 wide (the least that engines agree on).

    Not a Qwen2: AutoTokenizer would put Qwen2's own tokenizer class, pre-tokenizer included, in the place of
    the one that is saved beside the model, and encode other tokens.
    """
    heads = settings.hidden // HEAD
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def draw_batch(settings: WorldSettings, role: PlayerRole, rng: random.Random, spots: SoftSpots) -> list[Example]:
    """`warm_batch` examples of each role that the player has."""
    batch: list[Example] = []
    if role is not PlayerRole.DEFENDER:
        batch += [attacker_example(rng, settings.level, settings.reasoning) for _ in range(settings.warm_batch)]
    if role is not PlayerRole.ATTACKER:
        batch += [defender_example(rng, spots) for _ in range(settings.warm_batch)]
    return batch


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (batch, length) int64, padded on the right; only answers are labelled.

    Causal attention never looks at padding to the right, so no mask is needed.
    """
    prompts = tokenizer([chat(example.user) for example in examples], add_special_tokens=False)["input_ids"]
    answers = tokenizer([f"{example.answer} {tokenizer.eos_token}" for example in examples], add_special_tokens=False)[
        "input_ids"
    ]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short linear warm-up, then a cosine down to a fiftieth of the peak."""
    rise = min(1.0, (step + 1) / min(WARM_UP, steps))
    return peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    peak: float,
    report: Callable[[int, float], None],
) -> None:
    """Supervised learning in place, one batch of ids and labels a step (as `encode` makes them).

    `report(step, loss)` after every step (loss in nats a labelled token).
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, labels = next(batches)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        rows = targets != IGNORED
        loss = functional.cross_entropy(model.lm_head(hidden[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, loss.item())


def train_player(
    settings: WorldSettings, role: PlayerRole, report: Callable[[int, float], None]
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains one player on the CPU; `report(step, loss)` after every step (loss in nats a token).

    The result depends on the settings and the role only (and on the machine's arithmetic).
    """
    tokenizer = build_tokenizer()
    rng = random.Random(f"{role} {settings.seed}")
    model = new_model(settings, tokenizer, rng.randrange(1 << 31))
    spots = SoftSpots.draw(settings.seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield encode(draw_batch(settings, role, rng, spots), tokenizer)

    fit(model, batches(), steps=settings.warm_steps, peak=settings.warm_lr, report=report)
    return model.eval(), tokenizer


Make = Callable[[WorldSettings, str, Callable[[int, float], None]], tuple[LlamaForCausalLM, PreTrainedTokenizerFast]]


def run_child(arguments: Sequence[str], make: Make) -> None:
    """What a warm start's process does with its arguments: role, settings as JSON, folder."""
    role, settings, folder = arguments
    torch.set_num_threads(1)
    # whoever else prints (a library's logger) prints with the errors: the parent reads steps and losses only
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, tokenizer = make(
        WorldSettings.model_validate_json(settings),
        role,
        lambda step, loss: print(step, loss, file=progress, flush=True),
    )
    model.save_pretrained(Path(folder))
    tokenizer.save_pretrained(Path(folder))


if __name__ == "__main__":
    run_child(sys.argv[1:], lambda settings, role, report: train_player(settings, PlayerRole(role), report))
