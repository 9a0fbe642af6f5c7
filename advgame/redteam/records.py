"""The ledger: every query of a run as one JSONL line, and never the same query paid twice.

A line is written when the answer is there and before anybody uses it, so a killed run loses what was in flight at
most. A later run over the same file finds answers by key and by fingerprint (who was asked what, and how).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from advgame.errors import InputError
from advgame.redteam.budget import Budget, QueryFailed
from advgame.redteam.targets import Answer, Model, Rejected, Turns
from advgame.rollout.endpoint_http import EndpointRefused
from advgame.rollout.engine import EngineError, Sampling, stream_seed

NOTICE = "controlled artifact: adversarial prompts and answers; see CONTROLLED.md"

FAILURES_IN_A_ROW = 12
"""So many failures of one model without an answer in between end the run: it is down, and each costs its retries."""

KEPT = ("status", "text", "finish", "prompt_tokens", "completion_tokens")
"""What of a line is held in memory."""


TARGET = "target"
"""The role whose answers the budget of queries counts."""


@dataclass(frozen=True)
class Voice:
    """One role of a run: who speaks it and how it samples."""

    role: str
    model: Model
    sampling: Sampling


class Ledger:
    """Asks models, writes each answer down, and gives back what an earlier attempt has paid for.

    Use as a context manager. `counters`: `<role>_asked`, `_replayed`, `_rejected`, `_failed` of this attempt.
    """

    def __init__(self, path: Path, budget: Budget, run_seed: int, purpose: str):
        """Reads `path` if it exists. Raises InputError if a line of it, other than a torn last one, is no record."""
        self.path, self.budget, self.run_seed, self.purpose = path, budget, run_seed, purpose
        self.counters: Counter[str] = Counter()
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._failed_in_a_row: Counter[str] = Counter()
        self._file: IO[bytes] | None = None
        self._load()

    def __enter__(self) -> Ledger:
        self._file = self.path.open("ab")
        if self._file.tell() == 0:
            self._write({"notice": NOTICE, "purpose": self.purpose})
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    async def ask(self, voice: Voice, key: str, turns: Turns, sampling: Sampling | None = None) -> Answer | None:
        """The answer to `turns`, paid for now or before; None if the model rejects this request for good.

        `key` names the query within the run and decides its random stream. Raises Halt: no budget left, the user's
        stop, or a failure; EngineError when the model is down or refuses the address or the key.
        """
        how = sampling or voice.sampling
        key = f"{key}/{voice.role}"
        mark = fingerprint(voice.model.identity, turns, how)
        found = self._known.get((key, mark))
        if found is not None:
            self.counters[f"{voice.role}_replayed"] += 1
            return _answer(found)
        self.budget.reserve(voice.role == TARGET)
        try:
            record = await self._pay(voice, key, turns, how)
        finally:
            self.budget.settle(voice.role == TARGET)
        line: dict[str, Any] = {"key": key, "fingerprint": mark, "role": voice.role, "model": voice.model.identity}
        line |= {"sampling": [how.temperature, how.top_p, how.max_tokens], "turns": [list(t) for t in turns]} | record
        self._write(line)
        if record["status"] == "failed":
            self._count_failure(voice, record["error"])
        self._failed_in_a_row[voice.role] = 0
        self._keep(line)
        return _answer(line)

    async def _pay(self, voice: Voice, key: str, turns: Turns, how: Sampling) -> dict[str, Any]:
        start, began = time.time(), time.perf_counter()
        record: dict[str, Any] = {"time": round(start, 3)}
        self.counters[f"{voice.role}_asked"] += 1
        try:
            answer = await voice.model.chat(turns, how, self._seed(key))
        except Rejected as error:
            self.counters[f"{voice.role}_rejected"] += 1
            record |= {"status": "rejected", "error": str(error)}
        except EndpointRefused:
            raise
        except EngineError as error:
            self.counters[f"{voice.role}_failed"] += 1
            record |= {"status": "failed", "error": str(error)}
        else:
            record |= {"status": "ok", "text": answer.text, "finish": answer.finish_reason}
            record |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        return record | {"seconds": round(time.perf_counter() - began, 4)}

    def _keep(self, line: Mapping[str, Any]) -> None:
        """Remembers an answer, and counts what it cost: now or in an earlier start, but once."""
        self._known[line["key"], line["fingerprint"]] = {name: line.get(name) for name in KEPT}
        answer = _answer(line)
        self.budget.spend(line["role"] == TARGET, 0 if answer is None else answer.tokens)

    def _count_failure(self, voice: Voice, error: str) -> None:
        self._failed_in_a_row[voice.role] += 1
        if self._failed_in_a_row[voice.role] >= FAILURES_IN_A_ROW:
            raise EngineError(
                f"the {voice.role} failed {FAILURES_IN_A_ROW} times in a row, last: {error}; "
                "mend it and run the same command again, what was answered is kept"
            )
        raise QueryFailed(error)

    def _seed(self, key: str) -> int:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return stream_seed(self.run_seed, (int.from_bytes(digest, "little"),))

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "a ledger is a context manager"
        # one write a line: a kill leaves whole lines and at most one torn end
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def _load(self) -> None:
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        whole, newline, torn = raw.rpartition(b"\n")
        if torn:
            # the last process died while it wrote; that query is asked again
            with self.path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))
            self.counters["torn_lines"] += 1
        for number, text in enumerate(whole.split(b"\n") if newline else [], 1):
            try:
                line = json.loads(text.decode("utf-8", "surrogatepass"))
                if "notice" in line:
                    continue
                if line["status"] != "failed":
                    self._keep(line)
                else:
                    self.counters["failed_before"] += 1
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path} line {number}: no record of a query; restore the file") from error


def _answer(line: Mapping[str, Any]) -> Answer | None:
    if line["status"] == "rejected":
        return None
    return Answer(line["text"], line["finish"], line["prompt_tokens"], line["completion_tokens"])


def fingerprint(identity: str, turns: Turns, sampling: Sampling) -> str:
    """16 hex digits over who is asked what and how (blake2b)."""
    how = [sampling.temperature, sampling.top_p, sampling.max_tokens]
    text = json.dumps([identity, how, [list(turn) for turn in turns]], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
