"""Trees as a page holds them: text in small gzip chunks that are read when looked at, and an index of columns.

A chunk is base64 of gzip of JSON lines, one tree a line. The index has one entry a tree, little-endian columns:
step, chunk, flags (what a filter asks for), category, and the two rewards that a list is sorted by.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from advgame.game.pairs import best_and_worst
from advgame.game.rewards import TreeRewards, mean_scores
from advgame.game.tree import Attack, Category, Outcome, PairScore, Response, Tree
from advgame.run.metrics import ATTACK_SUCCESS_BELOW, COMPLIANCE_ABOVE
from advgame.run.tree_codec import RecordedTree

CHUNK_TREES = 256
CHUNK_CHARACTERS = 600_000
LONGEST_TEXT = 6000
"""Characters of a text that the page holds; what was cut is counted behind it."""

FLAGS = {
    "failed": "Defender failed (attack worked, or a refusal)",
    "held": "Defender held (all judged answers)",
    "attack_length": "attack: hit max length",
    "attack_unparsable": "attack: unparsable",
    "attack_unfaithful": "attack: unfaithful",
    "attack_no_faithfulness_verdict": "attack: no faithfulness verdict",
    "attack_engine_failed": "attack: engine failed",
    "response_length": "response: hit max length",
    "response_unparsable": "response: unparsable",
    "response_engine_failed": "response: engine failed",
    "no_verdict": "a verdict is missing",
    "no_attacker_pair": "no pair for the Attacker",
    "no_defender_pair": "no pair for the Defender",
}
"""What a tree can be filtered by; bit i of `flags` is the i-th name."""

_BIT = {name: 1 << bit for bit, name in enumerate(FLAGS)}
_COLUMNS = {"step": "I", "chunk": "I", "flags": "H", "category": "B", "attacker": "f", "defender": "f"}


class TreeStore:
    """Takes trees one by one; gives each full chunk to `write` and keeps the index only."""

    def __init__(self, write: Callable[[int, str], None]) -> None:
        """`write(number, text)` is called once a chunk, numbers from 0."""
        self._write = write
        self._lines: list[bytes] = []
        self._size = 0
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self.chunks = 0
        self.characters = 0
        """Characters of all chunks."""

    def __len__(self) -> int:
        return len(self._columns["step"])

    def add(self, recorded: RecordedTree) -> None:
        tree, rewards = recorded.tree, recorded.rewards
        # A lone surrogate cannot be encoded; as a backslash escape it is JSON again.
        text = json.dumps(plain_tree(tree, rewards), ensure_ascii=False, separators=(",", ":"))
        line = text.encode("utf-8", "backslashreplace")
        self._lines.append(line)
        self._size += len(line)
        entry = {
            "step": max(0, tree.step),
            "chunk": self.chunks,
            "flags": flags_of(tree, rewards),
            "category": int(tree.seed.category is Category.BENIGN),
            "attacker": max(_known(rewards.attacks), default=math.nan),
            "defender": min((r for group in rewards.responses for r in _known(group)), default=math.nan),
        }
        for name, value in entry.items():
            self._columns[name].append(value)
        if len(self._lines) >= CHUNK_TREES or self._size >= CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting as a chunk; call at the end."""
        if self._lines:
            text = pack(b"\n".join(self._lines))
            self._write(self.chunks, text)
            self.chunks += 1
            self.characters += len(text)
            self._lines, self._size = [], 0

    def index(self) -> dict[str, Any]:
        """`{"count", "chunks", "columns": {name: {"type", "data"}}}`, the data packed like a chunk."""
        types = {"I": "Uint32Array", "H": "Uint16Array", "B": "Uint8Array", "f": "Float32Array"}
        columns = {
            name: {"type": types[_COLUMNS[name]], "data": pack(_little_endian(column))}
            for name, column in self._columns.items()
        }
        return {"count": len(self), "chunks": self.chunks, "columns": columns}


def pack(data: bytes) -> str:
    """base64 of gzip; equal data give equal text."""
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode("ascii")


def flags_of(tree: Tree, rewards: TreeRewards) -> int:
    """The bits of `FLAGS` that hold for a tree; successes by the convention of `metrics.judged_rates`."""
    harmful = tree.seed.category is Category.HARMFUL
    found: set[str] = set()
    judged = 0
    for attack in tree.attacks:
        if attack.outcome is not Outcome.OK:
            found.add(f"attack_{attack.outcome}")
        scores = mean_scores(attack.verdicts, len(attack.responses))
        for response, score in zip(attack.responses, scores, strict=True):
            if response.outcome is not Outcome.OK:
                found.add(f"response_{response.outcome}")
            elif score is not None:
                judged += 1
                if score < ATTACK_SUCCESS_BELOW if harmful else not score > COMPLIANCE_ABOVE:
                    found.add("failed")
    if judged and "failed" not in found:
        found.add("held")
    if _missing(tree.verdicts) or any(_missing(attack.verdicts) for attack in tree.attacks):
        found.add("no_verdict")
    if best_and_worst([attack.sample for attack in tree.attacks], rewards.attacks, "") is None:
        found.add("no_attacker_pair")
    groups = zip(tree.attacks, rewards.responses, strict=True)
    if all(best_and_worst([r.sample for r in attack.responses], inner, "") is None for attack, inner in groups):
        found.add("no_defender_pair")
    return sum(_BIT[name] for name in found)


def plain_tree(tree: Tree, rewards: TreeRewards) -> dict[str, Any]:
    """What the page shows of a tree; no tokens and log-probs."""
    return {
        "step": tree.step,
        "index": tree.index,
        "category": str(tree.seed.category),
        "seed": {"id": _cut(tree.seed.id), "text": _cut(tree.seed.text)},
        "attacks": [
            _plain_attack(attack, reward, inner)
            for attack, reward, inner in zip(tree.attacks, rewards.attacks, rewards.responses, strict=True)
        ],
        "representatives": list(tree.representatives),
        "verdicts": _plain_verdicts(tree.verdicts),
    }


def _plain_attack(attack: Attack, reward: float | None, inner: Sequence[float | None]) -> dict[str, Any]:
    return {
        **_plain_item(attack, reward, attack.prompt),
        "direct": attack.direct,
        "responses": [
            _plain_item(response, value, response.answer)
            for response, value in zip(attack.responses, inner, strict=True)
        ],
        "verdicts": _plain_verdicts(attack.verdicts),
    }


def _plain_item(item: Attack | Response, reward: float | None, read: str | None) -> dict[str, Any]:
    """What attacks and responses have in common. `read`: the part that the other side reads; `raw`: all, if more."""
    return {
        "outcome": str(item.outcome),
        "reward": _number(reward),
        "tokens": None if item.sample is None else len(item.sample.token_ids),
        "version": None if item.sample is None else item.sample.version,
        "text": None if read is None else _cut(read),
        **({} if item.text == read else {"raw": _cut(item.text)}),
    }


def _plain_verdicts(verdicts: Sequence[PairScore]) -> list[list[Any]]:
    return [[v.first, v.second, None if v.scores is None else [_number(s) for s in v.scores]] for v in verdicts]


def _missing(verdicts: Sequence[PairScore]) -> bool:
    return any(verdict.scores is None for verdict in verdicts)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _cut(text: str) -> str:
    left = len(text) - LONGEST_TEXT
    return text if left <= 0 else f"{text[:LONGEST_TEXT]} […{left} more characters]"


def _little_endian(column: array[Any]) -> bytes:
    if sys.byteorder == "big":
        column = array(column.typecode, column)
        column.byteswap()
    return column.tobytes()
