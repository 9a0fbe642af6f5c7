"""Completions and verdicts on disk: JSONL that is written line by line, survives a kill, and is resumed by row id.

A store holds one good line a row. Opening it for writing first drops what shall be made anew: a line cut off by a
kill, failures, and lines whose `request` digest says that prompt, sampling or model were others. Which rows are done is
an index on disk: memory does not grow with the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from advgame.errors import InputError
from advgame.evals.classify import Item, Verdict
from advgame.evals.row import EvalRow
from advgame.evals.row_index import RowIndex
from advgame.game.parsing import after_reasoning

Line = dict[str, Any]


def digest(*parts: object) -> int:
    """A 63-bit number of the parts' texts: stable across machines and processes."""
    text = "\0".join(map(str, parts)).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Store:
    """One file of lines with `id`, `request` and `error`."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None

    def lines(self) -> Iterator[Line]:
        """Every whole line; nothing where there is no file. InputError names a damaged line."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    return  # a kill cut it off; it is made anew
                try:
                    line = json.loads(raw)
                    line["id"], line["request"]
                except (ValueError, TypeError, KeyError) as error:
                    raise InputError(
                        f"{self.path} line {number}: damaged ({type(error).__name__}); remove the line, it is made anew"
                    ) from error
                yield line

    def open(self, wanted: Callable[[str], int | None]) -> tuple[RowIndex, int]:
        """Readies the file for `add`. `wanted`: a row's request digest by id, None for rows that are not of this run.

        Returns the digests of the ids that are done, and how many lines were dropped.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done = RowIndex()
        dropped = 0
        fresh = self.path.with_name(f".{self.path.name}.tmp")
        with fresh.open("w", encoding="utf-8") as out:
            for line in self.lines():
                request, key = wanted(line["id"]), digest(line["id"])
                good = line.get("error") is None and key not in done
                if not good or (request is not None and request != line["request"]):
                    dropped += 1
                    continue
                done.add(key)
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        fresh.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        return done, dropped

    def add(self, line: Line) -> None:
        """One line, on its way to the disk when this returns."""
        assert self._file is not None, "opened before"
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def completion_line(row: EvalRow, request: int, response: str | None, finish: str, error: str | None) -> Line:
    """A completion with everything that classifying and scoring need, so that no data file is read again.

    `response` is all that was sampled; `answer` stands beside it where a reasoning block was taken off.
    """
    line: Line = {"id": row.id, "request": request, "prompt": row.prompt, "judged": row.judged, "want": row.want}
    line |= {key: value for key, value in (("context", row.context), ("group", row.group)) if value}
    line |= {"tags": dict(row.tags)} if row.tags else {}
    line |= {key: getattr(row, key) for key in ("label", "queries") if getattr(row, key) is not None}
    line |= {"response": response, "finish": finish, "error": error}
    answer = response and after_reasoning(response)
    return line if answer == response else line | {"answer": answer}


def row_of(line: Mapping[str, Any]) -> EvalRow:
    """The row of a completion's or a verdict's line."""
    return EvalRow(
        line["id"], line.get("prompt", ""), line.get("judged", ""), line["want"], line.get("context"),
        line.get("group", ""), line.get("tags", {}), line.get("response"), line.get("label"), line.get("queries"),
    )  # fmt: skip


def item_of(row: EvalRow) -> Item:
    """What a classifier reads of a completion: never its reasoning."""
    return Item(row.judged, after_reasoning(row.response or ""), row.context, row.id)


def verdict_line(row: EvalRow, request: int, verdict: Verdict) -> Line:
    """A verdict with what metrics need of its row."""
    line: Line = {"id": row.id, "request": request, "want": row.want}
    line |= {"group": row.group} if row.group else {}
    line |= {"tags": dict(row.tags)} if row.tags else {}
    line |= {"queries": row.queries} if row.queries is not None else {}
    for key in ("harmful", "refused", "prompt_harmful", "score"):
        value = getattr(verdict, key)
        line |= {key: value} if value is not None else {}
    line |= {"parse_error": True} if verdict.parse_error else {}
    return line | {"error": verdict.error, "raw": verdict.raw}


def verdict_of(line: Mapping[str, Any]) -> Verdict:
    return Verdict(
        line.get("harmful"), line.get("refused"), line.get("prompt_harmful"), line.get("score"), line.get("error"),
        line.get("parse_error", False), line.get("raw", ""),
    )  # fmt: skip
