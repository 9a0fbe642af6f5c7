"""Play without barriers against play stage by stage, on real vLLM engines: `python -m bench play [--out]`.

The rival plays as published: all attacks of the batch, then all faithfulness verdicts, then all responses, then all
verdicts of the Defender's judge, then those of the Attacker's; each stage waits for its slowest request. Attacker,
Defender and judge are an engine each. Random weights end nowhere, so every request is given its length: log-normal,
drawn from its key, the same for both contenders. The judge's verdict is a hash of the tokens that its engine made.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from advgame.game.judge import Key, judge_candidates
from advgame.game.parsing import parse_attack, parse_response
from advgame.game.play import PlayRules, Stream, Table, play_batch
from advgame.game.prompts import Templates
from advgame.game.rewards import representative
from advgame.game.tree import (
    Attack,
    Category,
    Outcome,
    Response,
    Rubric,
    Sample,
    Seed,
    Tree,
    attacker_rubric,
    defender_rubric,
)
from advgame.rollout import vllm_start
from advgame.rollout.engine import Request, Sampling, stream_seed
from advgame.rollout.settings import VllmSettings
from advgame.rollout.speaker import Speaker
from advgame.rollout.vllm_engine import VllmEngine
from bench.kernels import device_name

VOCABULARY, SEED = 256, 0
ROLES = ("attacker", "defender", "judge")


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
    """A chat format of one token a word: numbers are token ids, other words hash to one."""

    def __init__(self, frame: str = "{}"):
        self.frame = frame

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        return tuple(int(w) % VOCABULARY if w.isdigit() else _hash(w) % VOCABULARY for w in user.split())

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


async def play_stages(table: Table, seeds: Sequence[Seed], step: int) -> list[Tree]:
    """A batch with a barrier after every stage; the same keys, so the same trees as `play_batch`."""
    assert table.attacker is not None, "this game has an Attacker"
    rules, ask = table.rules, table.attacker.ask
    places = [(t, a) for t in range(len(seeds)) for a in range(rules.attacks)]
    made = await asyncio.gather(
        *(ask(table.templates.attacker(seeds[t]), (step, t, Stream.ATTACK, a)) for t, a in places)
    )
    prompts = [None if sample is None else parse_attack(text, reasoning=rules.reasoning) for sample, text in made]

    async def faithful(t: int, a: int, prompt: str | None) -> bool | None:
        if prompt is None:
            return None
        return await table.judge.faithful(seeds[t], prompt, key=(step, t, Stream.FAITHFUL, a))

    verdicts = await asyncio.gather(*(faithful(t, a, p) for (t, a), p in zip(places, prompts, strict=True)))
    attacks = [Attack(*one, prompt, verdict) for one, prompt, verdict in zip(made, prompts, verdicts, strict=True)]

    async def responses(t: int, a: int, attack: Attack) -> tuple[Response, ...]:
        if attack.outcome is not Outcome.OK or attack.prompt is None:
            return ()
        text = table.templates.defender(attack.prompt)
        said = await asyncio.gather(
            *(table.defender.ask(text, (step, t, Stream.RESPONSE, a, d)) for d in range(rules.responses))
        )
        return tuple(Response(s, answer, parse_response(answer, reasoning=False)) for s, answer in said)

    answered = await asyncio.gather(*(responses(t, a, x) for (t, a), x in zip(places, attacks, strict=True)))

    async def judged(t: int, a: int, attack: Attack, group: Sequence[Response]) -> Attack:
        if not group or attack.prompt is None:
            return attack
        scored = await judge_candidates(
            table.judge,
            defender_rubric(seeds[t].category),
            attack.prompt,
            [(d, r.answer) for d, r in enumerate(group) if r.answer is not None],
            pairwise=True,
            key=(step, t, Stream.DEFENDER_JUDGE, a),
        )
        return replace(attack, responses=tuple(group), verdicts=scored)

    finished = await asyncio.gather(
        *(judged(t, a, x, group) for (t, a), x, group in zip(places, attacks, answered, strict=True))
    )

    async def tree(t: int) -> Tree:
        own = finished[t * rules.attacks : (t + 1) * rules.attacks]
        chosen = tuple(representative(attack, rules.optimistic) for attack in own)
        candidates = [
            (a, answer)
            for a, (attack, d) in enumerate(zip(own, chosen, strict=True))
            if d is not None and (answer := attack.responses[d].answer) is not None
        ]
        rubric, key = attacker_rubric(seeds[t].category), (step, t, Stream.ATTACKER_JUDGE)
        scored = await judge_candidates(table.judge, rubric, seeds[t].text, candidates, pairwise=True, key=key)
        return Tree(seeds[t], step, t, tuple(own), chosen, scored)

    return list(await asyncio.gather(*(tree(t) for t in range(len(seeds)))))


def without_logprobs(tree: Tree) -> Tree:
    """What must be equal: tokens, verdicts, structure. Log-probs round as the batch happened to be."""

    def bare(sample: Sample | None) -> Sample | None:
        return None if sample is None else replace(sample, logprobs=())

    def attack(one: Attack) -> Attack:
        responses = tuple(replace(r, sample=bare(r.sample)) for r in one.responses)
        return replace(one, sample=bare(one.sample), responses=responses)

    return replace(tree, attacks=tuple(map(attack, tree.attacks)))


def model_folder(folder: Path, positions: int) -> Path:
    """A random Qwen2 of 0.1 M parameters, saved: a forward costs about the same for one sequence and for many, as a
    decoding step of a large model on a GPU does, which reads all weights for either."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


async def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both contenders in alternation, on the same running engines with empty caches."""
    settings = VllmSettings(
        max_model_len=options.positions, cache_gib=options.cache_gib, max_sequences=options.max_sequences
    )
    players, judge = Lengths(options.median, 0.6, options.cut), Lengths(options.judge_median, 0.6, options.cut)
    engines = {
        role: VllmEngine(folder, name=role, settings=settings, dtype="float32", stop_ids=[], version=0)
        for role in ROLES
    }
    sampling = Sampling(1.0, 1.0, options.cut)
    frames = {"attacker": "<think> why </think> <prompt> {} </prompt>"}
    speakers = {}
    for role, engine in engines.items():
        given = Given(engine, judge if role == "judge" else players)
        # only `generate` is asked of it
        speakers[role] = Speaker(role, given, Words(frames.get(role, "{}")), sampling, SEED, retries=0)  # type: ignore[arg-type]
    templates = Templates.load()
    table = Table(
        speakers["attacker"], speakers["defender"], HashJudge(speakers["judge"], templates), templates,
        PlayRules(attacks=options.attacks, responses=options.responses),
    )  # fmt: skip
    seeds = [
        Seed(str(i), tuple(Category)[i % 2], " ".join(str(stream_seed(SEED, (i, w)) % VOCABULARY) for w in range(24)))
        for i in range(options.seeds)
    ]

    async def free(step: int) -> list[Tree]:
        return await play_batch(table, seeds, step, in_flight=len(seeds))

    async def barred(step: int) -> list[Tree]:
        return await play_stages(table, seeds, step)

    contenders: dict[str, Callable[[int], Awaitable[list[Tree]]]] = {"stage by stage": barred, "no barriers": free}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    differ = 0
    try:
        for engine in engines.values():
            await engine.start()
        for turn in range(options.rounds + 1):
            played = {}
            # who goes first changes with the rounds
            for name in sorted(contenders, reverse=turn % 2 == 0):
                for role, engine in engines.items():
                    await vllm_start.reset_caches(engine._llm)
                    speakers[role].meter.take()
                started = time.perf_counter()
                played[name] = await contenders[name](turn)
                seconds = time.perf_counter() - started
                busy = {role: speakers[role].meter.take() for role in ROLES}
                if turn:  # the first round warms up
                    runs[name].append({"seconds": seconds, "engine": {r: b for r, (b, _) in busy.items()},
                                       "requests": {r: s for r, (_, s) in busy.items()}})  # fmt: skip
            first, second = (list(map(without_logprobs, trees)) for trees in played.values())
            differ += sum(a != b for a, b in zip(first, second, strict=True))
    finally:
        for engine in engines.values():
            await engine.close()
    counters = {role: dict(speaker.counters) for role, speaker in speakers.items()}
    return {"runs": runs, "differ": differ, "counters": counters, "trees": len(seeds)}


def report(result: dict[str, Any]) -> None:
    """Prints the table and the verdict; adds medians to `result`."""
    trees, runs = result["trees"], result["runs"]
    print(
        f"  {'median':16}{'s':>8}{'trees/s':>9}{'trees/h':>9}   engine-seconds " + "  ".join(ROLES) + "   judge's share"
    )
    medians = {}
    for name, taken in runs.items():
        seconds = statistics.median(r["seconds"] for r in taken)
        engine = {role: statistics.median(r["engine"][role] for r in taken) for role in ROLES}
        share = engine["judge"] / sum(engine.values())
        medians[name] = {"seconds": seconds, "trees_per_hour": 3600 * trees / seconds, "engine_seconds": engine}
        cells = "  ".join(f"{engine[role]:.2f}" for role in ROLES)
        rounds = ", ".join(f"{r['seconds']:.1f}" for r in taken)
        print(
            f"  {name:16}{seconds:8.2f}{trees / seconds:9.2f}{3600 * trees / seconds:9.0f}   {cells}   {share:.0%}"
            f"   all rounds: {rounds}"
        )
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["stage by stage"], runs["no barriers"], strict=True)]
    print(
        f"  no barriers is {statistics.median(ratios):.2f} x faster (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    )
    result |= {"median": medians, "ratios": ratios, "ratio": statistics.median(ratios)}


def main(arguments: list[str]) -> int:
    """Command line; prints a table, and writes JSON with `--out`. Exit code 1: the contenders played other trees."""
    parser = argparse.ArgumentParser(prog="python -m bench play", description=__doc__)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--attacks", type=int, default=2)
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--median", type=float, default=75.0, help="tokens of an attack or response")
    parser.add_argument("--judge-median", type=float, default=100.0, help="tokens of a verdict")
    parser.add_argument("--cut", type=int, default=512, help="longest completion")
    parser.add_argument("--positions", type=int, default=4096, help="longest prompt + completion")
    parser.add_argument(
        "--max-sequences", type=int, default=256, help="most completions that an engine decodes at once"
    )
    parser.add_argument("--cache-gib", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", action="store_true", help="write bench/results/play-<device>-<date>.json")
    options = parser.parse_args(arguments)
    version = vllm_start.vllm_version("bench play")
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(model_folder(Path(folder), options.positions), options))
    name = device_name(torch.device("cpu"))
    print(f"{name}, vLLM {version}, torch {torch.__version__}; three engines of one thread each")
    print(
        f"{options.seeds} seeds, A = {options.attacks}, D = {options.responses}; lengths log-normal, sigma 0.6, "
        f"median {options.median:g} (judge {options.judge_median:g}), cut {options.cut}, seed {SEED}; "
        f"at most {options.max_sequences} sequences an engine"
    )
    report(result)
    total = options.seeds * (options.rounds + 1)
    print(f"  equal trees (tokens, verdicts, representatives): {total - result['differ']} of {total}")
    if options.out:
        result |= {"options": vars(options), "device": name, "vllm": version, "torch": torch.__version__}
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        target = Path(__file__).parent / "results" / f"play-cpu-{date}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(target.name)
    return 1 if result["differ"] else 0
