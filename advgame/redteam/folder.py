"""The folder of a campaign: what was asked for (checked when it goes on), what was found, marked as controlled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from advgame.errors import InputError
from advgame.redteam.records import NOTICE
from advgame.redteam.strategies import Attempt
from advgame.run.environment import describe_environment
from advgame.run.folder import RunLock, write_text_atomically

_NOTICE = """# Controlled artifacts

This folder records a red-team run: prompts that were optimised to make a language model misbehave, and what it
answered (`queries.jsonl`, `results.jsonl`, the exports and the page).

Stated purpose of this run: {purpose}

- Keep them within the group that the purpose names.
- Share aggregate numbers freely (`summary.json`), single attacks only where the purpose needs them.
- Delete them when the purpose is served.
"""


@dataclass(frozen=True)
class CampaignFolder:
    """A folder and its lock; use as a context manager."""

    path: Path
    purpose: str
    settings: Mapping[str, Any]
    lock: RunLock

    @classmethod
    def open(cls, path: Path, purpose: str, settings: Mapping[str, Any]) -> CampaignFolder:
        """A new folder, or one of the same settings to go on with.

        Raises InputError: another process writes there, it holds something else, or its run had other settings.
        """
        settings = json.loads(json.dumps(settings))  # as they will be read
        known = path / "run.json"
        if path.exists() and not path.is_dir():
            raise InputError(f"--out: {path} is a file; name a folder")
        if path.is_dir() and not known.is_file() and any(p.name != ".lock" for p in path.iterdir()):
            raise InputError(f"--out: {path} is no red-team run and not empty; choose another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: {path} cannot be made ({error.strerror}); choose another folder") from error
        lock = RunLock(path / ".lock")
        try:
            if known.is_file():
                _compare(known, settings)
            folder = cls(path, purpose, settings, lock)
            folder._start()
        except BaseException:
            lock.release()
            raise
        return folder

    def __enter__(self) -> CampaignFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    @property
    def queries(self) -> Path:
        return self.path / "queries.jsonl"

    def finish(self, attempts: Sequence[Attempt], summary: Mapping[str, Any], counters: Mapping[str, int]) -> None:
        """Writes `results.jsonl` (a line a seed) and `summary.json`; adds this start's counters to `run.json`."""
        lines = [json.dumps({"notice": NOTICE, "purpose": self.purpose})]
        lines += [json.dumps(_line(attempt), ensure_ascii=True) for attempt in attempts]
        write_text_atomically(self.path / "results.jsonl", "\n".join(lines) + "\n")
        write_text_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        record = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        record["starts"][-1]["counters"] = dict(counters)
        write_text_atomically(self.path / "run.json", json.dumps(record, indent=1) + "\n")

    def _start(self) -> None:
        known = self.path / "run.json"
        starts = json.loads(known.read_text(encoding="utf-8"))["starts"] if known.is_file() else []
        starts.append({"environment": describe_environment(), "purpose": self.purpose})
        record = {"notice": NOTICE, "purpose": self.purpose, "settings": self.settings, "starts": starts}
        write_text_atomically(known, json.dumps(record, indent=1) + "\n")
        (self.path / "CONTROLLED.md").write_text(_NOTICE.format(purpose=self.purpose), encoding="utf-8")


def recorded_purpose(path: Path) -> str:
    """The purpose that a folder's earlier run stated; "" without one."""
    try:
        return str(json.loads((path / "run.json").read_text(encoding="utf-8"))["purpose"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _compare(known: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads(known.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{known}: unreadable ({error}); choose another --out") from error
    for name in [*settings, *before]:
        if before.get(name) != settings.get(name):
            raise InputError(
                f"--out: {known.parent} was begun with {name} {_short(before.get(name))}, now it is "
                f"{_short(settings.get(name))}; give the same, or another folder"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _line(attempt: Attempt) -> dict[str, Any]:
    seed = attempt.seed
    return {
        "seed": {"id": seed.id, "category": seed.category.value, "text": seed.text, "meta": dict(seed.meta)},
        "stop": attempt.stop.value,
        "why": attempt.why,
        "queries": attempt.queries,
        "submitted": attempt.best,
        "candidates": [asdict(candidate) for candidate in attempt.candidates],
    }
