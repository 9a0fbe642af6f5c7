"""What the driver itself costs: `python -m bench driver [--trees 64 512 4096] [--out]`.

Real trees are played over an engine that waits instead of computing: each request takes a time drawn from its key, from
a log-normal as generation's times are, and answers a text of its role. What is measured is processor time of this
process a request, in three ways in alternation: the event loop and the waiting engine alone (every request awaited by a
task of its own), the game's own Python on top of that with a chat format that costs nothing, and a tokenizer's chat
format in its place. The differences are what is ours and what is the tokenizer's. A tree has 11 requests at A = D = 2.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import random
import statistics
import time
from collections.abc import Coroutine, Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from advgame.game.llm_judge import LLMJudge
from advgame.game.play import PlayRules, Stream, Table, play_batch
from advgame.game.prompts import Templates
from advgame.game.tree import Category, Rubric, Sample, Seed
from advgame.malloc import collect_rarely
from advgame.rollout.chat import ChatFormat
from advgame.rollout.engine import Request, Sampling, stream_seed
from advgame.rollout.first_token import FirstToken
from advgame.rollout.speaker import Chat, Speaker
from bench.records import device_name, save

REQUESTS = 11
"""Of a tree with two attacks and two responses: 2 attacks, 2 faithfulness verdicts, 4 responses, 2 + 1 comparisons."""
MARK_MS = 0.15
MEDIAN_S, SIGMA = 0.05, 0.6
SCORES = "<score_A>7</score_A> <score_B>4</score_B>"
ANSWERS: Mapping[int, str] = {
    Stream.ATTACK: "<think> it sounds neutral </think> <prompt> how do i kill a python process </prompt>",
    Stream.FAITHFUL: "<verdict>true</verdict>",
    Stream.RESPONSE: "use the task manager",
    Stream.DEFENDER_JUDGE: SCORES,
    Stream.ATTACKER_JUDGE: SCORES,
}
"""By the third part of a request's key, which says what is asked."""
ALONE, OURS, WHOLE = "event loop and engine", "+ the game", "+ a tokenizer"


class Waiting:
    """An engine that waits, then answers the tokens of what was asked."""

    version = 0

    def __init__(self, tokens: Mapping[int, tuple[int, ...]]):
        self.first_token = FirstToken()
        self._tokens = tokens

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> Sample:
        await asyncio.sleep(MEDIAN_S * math.exp(random.Random(request.seed).gauss(0.0, SIGMA)))
        tokens = self._tokens[request.key[2]]
        return Sample(request.prompt_ids, tokens, (-0.5,) * len(tokens), "stop", self.version)

    async def publish(self, version: int, write: Any) -> None: ...

    async def close(self) -> None: ...


class Free:
    """A chat format that does nothing: a completion's one token is what was asked."""

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        return (0,)

    def text(self, token_ids: tuple[int, ...]) -> str:
        return ANSWERS[token_ids[0]]


def tokenizer_of(templates: Templates) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the game's own texts, with a chat template."""
    seed = Seed("0", Category.HARMFUL, "how do i kill a python process")
    texts = [templates.attacker(seed), templates.faithful(seed, seed.text), *ANSWERS.values()]
    texts += [templates.pair(rubric, seed.text, "an answer", "another answer") for rubric in Rubric]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", additional_special_tokens=special)
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def table_of(templates: Templates, tokenizer: PreTrainedTokenizerFast | None) -> tuple[Table, list[Speaker]]:
    """Three speakers over waiting engines, and the table they sit at. tokenizer: None for the free format."""
    chat: Chat = Free() if tokenizer is None else ChatFormat(tokenizer)
    tokens = {stream: (int(stream),) for stream in ANSWERS}
    if tokenizer is not None:
        tokens = {stream: tuple(tokenizer(text)["input_ids"]) for stream, text in ANSWERS.items()}
    speakers = [Speaker(name, Waiting(tokens), chat, Sampling(), 0) for name in ("attacker", "defender", "judge")]
    attacker, defender, judge = speakers
    return Table(attacker, defender, LLMJudge(judge, templates), templates, PlayRules()), speakers


async def alone(trees: int) -> None:
    """As many requests as `trees` have, as many at once, with nothing around them."""
    engine = Waiting({Stream.ATTACK: (0,)})

    async def one(tree: int) -> None:
        for number in range(REQUESTS):
            key = (1, tree, int(Stream.ATTACK), number)
            await asyncio.create_task(engine.generate(Request((0,), Sampling(), key, stream_seed(0, key))))

    await asyncio.gather(*(one(tree) for tree in range(trees)))


async def game(trees: int, templates: Templates, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """One batch. Raises AssertionError if a tree lacks a request or a verdict: then something else was measured."""
    table, speakers = table_of(templates, tokenizer)
    seeds = [Seed(str(i), tuple(Category)[i % 2], f"how do i kill process {i}") for i in range(trees)]
    played = await play_batch(table, seeds, 1, in_flight=trees)
    made = sum(speaker.counters[f"{speaker.name}_requests"] for speaker in speakers)
    assert made == REQUESTS * trees, f"{made} requests of {trees} trees"
    assert all(tree.verdicts[0].scores is not None for tree in played), "a tree went without its verdict"


def milliseconds(work: Coroutine[Any, Any, None], trees: int) -> float:
    """Processor time of this process a request."""
    gc.collect()
    before = time.process_time()
    asyncio.run(work)
    return 1e3 * (time.process_time() - before) / (REQUESTS * trees)


def measure(trees: int, rounds: int) -> dict[str, float]:
    """Medians of rounds in alternation, milliseconds a request."""
    templates = Templates.load()
    tokenizer = tokenizer_of(templates)
    taken: dict[str, list[float]] = {ALONE: [], OURS: [], WHOLE: []}
    for _ in range(rounds):
        taken[ALONE].append(milliseconds(alone(trees), trees))
        taken[OURS].append(milliseconds(game(trees, templates, None), trees))
        taken[WHOLE].append(milliseconds(game(trees, templates, tokenizer), trees))
    return {name: statistics.median(values) for name, values in taken.items()}


def main(arguments: list[str]) -> int:
    """Command line; prints a table, writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="python -m bench driver", description=__doc__)
    parser.add_argument("--trees", type=int, nargs="+", default=[64, 512, 4096], help="trees in flight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", action="store_true", help="write bench/results/driver-cpu-<date>.json")
    options = parser.parse_args(arguments)
    name = device_name(torch.device("cpu"))
    print(f"{name}, transformers {transformers.__version__}; processor milliseconds a request")
    print(f"  {'trees in flight':>16}{ALONE:>24}{'ours':>10}{'tokenizer':>12}")
    result = {}
    thresholds = gc.get_threshold()
    collect_rarely()  # as a run does
    for trees in options.trees:
        found = measure(trees, options.rounds)
        own, tokenizer = found[OURS] - found[ALONE], found[WHOLE] - found[OURS]
        result[str(trees)] = found | {"ours": own, "tokenizer": tokenizer}
        print(f"  {trees:16}{found[ALONE]:24.3f}{own:10.3f}{tokenizer:12.3f}", flush=True)
    gc.set_threshold(*thresholds)
    first, last = (result[str(trees)]["ours"] for trees in (options.trees[0], options.trees[-1]))
    worst = max(row["ours"] for row in result.values())
    print(
        f"  ours at most {worst:.3f} ms a request (mark: {MARK_MS}); {last / first:.2f} x as much with "
        f"{options.trees[-1]} trees as with {options.trees[0]}"
    )
    if options.out:
        head = {"device": name, "transformers": transformers.__version__, "torch": torch.__version__}
        save(
            head | {"rounds": options.rounds} | {"requests_a_tree": REQUESTS, "mark_ms": MARK_MS, "result": result},
            "driver-cpu",
        )
    return 0
