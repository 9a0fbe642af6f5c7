"""Trees to JSON and back, exactly: what is read equals what was recorded, down to the last bit of a log-prob.

Floats are written by `repr` (the shortest text that reads back to the same double); the three values that
JSON lacks become the strings "nan", "inf" and "-inf". Text is ASCII-escaped, so that lone surrogates survive.
Fields marked "derived" are for human readers and `jq`; reading ignores them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from advgame.errors import InputError
from advgame.game.rewards import TreeRewards
from advgame.game.tree import Attack, Category, PairScore, Response, Sample, Seed, Tree

FORMAT = 1


@dataclass(frozen=True)
class RecordedTree:
    """A tree as it was played, with the rewards that training used."""

    tree: Tree
    rewards: TreeRewards


def encode_tree(tree: Tree, rewards: TreeRewards) -> dict[str, Any]:
    """A JSON-able mapping of everything in `tree` and `rewards`."""
    groups = zip(tree.attacks, rewards.attacks, rewards.responses, strict=True)
    return {
        "format": FORMAT,
        "step": tree.step,
        "index": tree.index,
        "seed": {
            "id": tree.seed.id,
            "category": str(tree.seed.category),
            "text": tree.seed.text,
            "meta": dict(tree.seed.meta),
        },
        "attacks": [_encode_attack(attack, reward, inner) for attack, reward, inner in groups],
        "representatives": list(tree.representatives),
        "verdicts": _encode_verdicts(tree.verdicts),
    }


def decode_tree(line: Any) -> RecordedTree:
    """The inverse of `encode_tree`. Raises InputError naming the field that is missing or malformed."""
    try:
        if line["format"] != FORMAT:
            raise InputError(f"field 'format' is {line['format']!r}; this version reads {FORMAT}")
        seed = line["seed"]
        tree = Tree(
            seed=Seed(seed["id"], Category(seed["category"]), seed["text"], dict(seed["meta"])),
            step=line["step"],
            index=line["index"],
            attacks=tuple(_decode_attack(attack) for attack in line["attacks"]),
            representatives=tuple(line["representatives"]),
            verdicts=_decode_verdicts(line["verdicts"]),
        )
        rewards = TreeRewards(
            tuple(_optional(attack["reward"]) for attack in line["attacks"]),
            tuple(tuple(_optional(r["reward"]) for r in attack["responses"]) for attack in line["attacks"]),
        )
    except KeyError as error:
        raise InputError(f"field {error} is missing") from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"not a recorded tree ({error})") from error
    return RecordedTree(tree, rewards)


def _encode_attack(attack: Attack, reward: float | None, inner: Sequence[float | None]) -> dict[str, Any]:
    return {
        "outcome": str(attack.outcome),  # derived
        "reward": None if reward is None else _number(reward),
        "text": attack.text,
        "prompt": attack.prompt,
        "faithful": attack.faithful,
        "direct": attack.direct,
        "sample": _encode_sample(attack.sample),
        "responses": [_encode_response(r, value) for r, value in zip(attack.responses, inner, strict=True)],
        "verdicts": _encode_verdicts(attack.verdicts),
    }


def _decode_attack(line: Any) -> Attack:
    return Attack(
        sample=_decode_sample(line["sample"]),
        text=line["text"],
        prompt=line["prompt"],
        faithful=line["faithful"],
        responses=tuple(Response(_decode_sample(r["sample"]), r["text"], r["answer"]) for r in line["responses"]),
        verdicts=_decode_verdicts(line["verdicts"]),
        direct=line["direct"],
    )


def _encode_response(response: Response, reward: float | None) -> dict[str, Any]:
    return {
        "outcome": str(response.outcome),  # derived
        "reward": None if reward is None else _number(reward),
        "text": response.text,
        "answer": response.answer,
        "sample": _encode_sample(response.sample),
    }


def _encode_sample(sample: Sample | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    return {
        "version": sample.version,
        "finish_reason": sample.finish_reason,
        "prompt_ids": list(sample.prompt_ids),
        "token_ids": list(sample.token_ids),
        "logprobs": [_number(value) for value in sample.logprobs],
    }


def _decode_sample(line: Any) -> Sample | None:
    if line is None:
        return None
    return Sample(
        prompt_ids=tuple(line["prompt_ids"]),
        token_ids=tuple(line["token_ids"]),
        logprobs=tuple(float(value) for value in line["logprobs"]),
        finish_reason=line["finish_reason"],
        version=line["version"],
    )


def _encode_verdicts(verdicts: Sequence[PairScore]) -> list[list[Any]]:
    """One `[first, second, [score, score] or null]` a verdict."""
    return [[v.first, v.second, None if v.scores is None else [_number(s) for s in v.scores]] for v in verdicts]


def _decode_verdicts(lines: Any) -> tuple[PairScore, ...]:
    return tuple(
        PairScore(first, second, None if scores is None else (float(scores[0]), float(scores[1])))
        for first, second, scores in lines
    )


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
