"""The recorder: what each step measured and played, appended to the run folder and never overwritten."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from advgame.errors import InputError
from advgame.game.rewards import TreeRewards
from advgame.game.tree import Tree
from advgame.run.folder import RunFolder, write_text_atomically
from advgame.run.tree_codec import RecordedTree, decode_tree, encode_tree

_TREE_FILE = re.compile(r"(\d{6,})\.jsonl\.gz")
_OWN_KEYS = ("step", "attempt", "time", "non_finite")


class Recorder:
    """Writes `metrics.jsonl` and `trees/` of one run folder.

    `counters["metrics_non_finite"]` counts the NaN and infinite values that were written as null,
    `counters["metrics_torn"]` the lines that a killed process left unfinished.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.counters: Counter[str] = Counter()
        self._set_torn_line_aside()
        self._metrics = folder.metrics.open("a", encoding="utf-8")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line `{"step", "attempt", "time", ...values}` and flushes it; `time` is seconds since
        1970.

        A NaN or infinite value becomes null, is counted, and the line says how many under `non_finite`.
        """
        clash = [key for key in _OWN_KEYS if key in values]
        if clash:
            raise InputError(f"metric name {clash[0]!r} is one of the recorder's own; rename the metric")
        numbers = {key: float(value) for key, value in values.items()}
        row: dict[str, Any] = {"step": step, "attempt": self.folder.attempt, "time": round(time.time(), 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        if broken := sum(not math.isfinite(value) for value in numbers.values()):
            row["non_finite"] = broken
            self.counters["metrics_non_finite"] += broken
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    def trees(self, step: int, trees: Sequence[Tree], rewards: Sequence[TreeRewards]) -> Path:
        """Writes all trees of a step to `trees/<step>.jsonl.gz`, one line a tree; the file appears complete.

        Raises InputError when the step's trees were recorded before (`rewind` comes first on a resume).
        """
        path = self.folder.trees / f"{step:06d}.jsonl.gz"
        if path.exists():
            raise InputError(f"{path}: trees of step {step} are recorded already; rewind the recorder first")
        temporary = path.with_name(f".{path.name}.tmp")
        write_trees(temporary, trees, rewards)
        temporary.replace(path)
        return path

    def rewind(self, step: int) -> None:
        """Sets aside everything recorded for steps >= `step`, which the resumed run is about to play again.

        Rows move to `metrics.attemptN.jsonl` and tree files to `<step>.attemptN.jsonl.gz`, N being the
        attempt that was cut short; rows keep their own `attempt`. Nothing is lost, and nothing is counted
        twice.
        """
        self._metrics.close()
        label = f"attempt{max(self.folder.attempt - 1, 0)}"
        kept: list[str] = []
        moved: list[str] = []
        for line, row in _rows(self.folder.metrics):
            (moved if row["step"] >= step else kept).append(line)
        if moved:
            # The aside first: a crash between the two leaves rows twice on disk rather than nowhere.
            aside = _free(self.folder.metrics.with_name(f"metrics.{label}.jsonl"))
            write_text_atomically(aside, "".join(moved))
            write_text_atomically(self.folder.metrics, "".join(kept))
        for path in tree_files(self.folder.trees):
            number = path.name.split(".", 1)[0]
            if int(number) >= step:
                path.rename(_free(path.with_name(f"{number}.{label}.jsonl.gz")))
        self._metrics = self.folder.metrics.open("a", encoding="utf-8")

    def close(self) -> None:
        self._metrics.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_torn_line_aside(self) -> None:
        """Moves an unfinished last line (a process killed while writing) to `metrics.torn.txt`."""
        path = self.folder.metrics
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with path.with_name("metrics.torn.txt").open("ab") as torn:
                torn.write(data[end:] + b"\n")
            os.truncate(path, end)
            self.counters["metrics_torn"] += 1


def tree_files(folder: Path) -> list[Path]:
    """The tree files that count (none set aside by a rewind), by step."""
    named = [(int(match.group(1)), p) for p in folder.iterdir() if (match := _TREE_FILE.fullmatch(p.name))]
    return [path for _, path in sorted(named)]


def write_trees(path: Path, trees: Sequence[Tree], rewards: Sequence[TreeRewards]) -> None:
    """A gzip file with one line a tree; equal trees give equal bytes."""
    with path.open("wb") as raw:
        # No file name and time inside. Level 6: a third of level 9's time.
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed:
            for tree, reward in zip(trees, rewards, strict=True):
                line = json.dumps(encode_tree(tree, reward), separators=(",", ":"))
                packed.write(line.encode() + b"\n")
        raw.flush()
        os.fsync(raw.fileno())


def read_trees(path: Path) -> Iterator[RecordedTree]:
    """The trees of one file, in the order of recording. Raises InputError naming file, line and field."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007  (read after the loop, in the errors)
                yield decode_tree(json.loads(line))
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a gzip file of trees ({error})") from error
    except ValueError as error:  # InputError and JSON errors alike
        raise InputError(f"{path}, line {number}: {error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order; an unfinished last line (a run still writing) is left out. Raises
    InputError naming a line that is none."""
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines with their rows."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if not line.endswith("\n"):
                return
            raise InputError(f"{path}, line {number}: not JSON, or no row of metrics ({error})") from error
        yield line, row


def _free(path: Path) -> Path:
    """`path`, or the first `<stem>.2`, `.3`, ... that does not exist: a second rewind overwrites nothing."""
    stem, *suffixes = path.name.split(".jsonl", 1)
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{stem}.{number}.jsonl{''.join(suffixes)}")
    return candidate
