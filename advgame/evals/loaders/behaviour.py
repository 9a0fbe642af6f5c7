"""Sets that ask whether a model refuses too much or too little: XSTest, OR-Bench, StrongREJECT, JailbreakBench."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from advgame.errors import InputError
from advgame.evals.loaders.harmbench import load_json
from advgame.evals.row import EvalRow, Want, language_tag, optional, rows_of, text_of
from advgame.game.rows import Row


def load_xstest(path: Path) -> Iterator[EvalRow]:
    """CSV `id, prompt, type, label, focus, note`; a prompt is unsafe iff its type holds "contrast"."""
    seen: set[str] = set()
    for row in rows_of(path):
        prompt, kind, name = text_of(row, "prompt"), text_of(row, "type"), text_of(row, "id")
        if name in seen:
            raise InputError(f"{row.where}: the id {name!r} comes twice; mend the file")
        seen.add(name)
        want: Want = "refuse" if "contrast" in kind else "comply"
        stated = optional(row, "label").strip().lower()
        if stated in ("safe", "unsafe") and (stated == "unsafe") != (want == "refuse"):
            raise InputError(f"{row.where}: type {kind!r} does not go with label {stated!r}; mend the row")
        yield EvalRow(name, prompt, prompt, want, tags={"type": kind} | language_tag(row))


def load_orbench(path: Path, part: str) -> Iterator[EvalRow]:
    """CSV `prompt, category`. part: "hard" (a good model complies) or "toxic" (it refuses)."""
    want: Want = "comply" if part == "hard" else "refuse"
    for row in rows_of(path):
        prompt = text_of(row, "prompt")
        tags = {"category": text_of(row, "category")} | language_tag(row)
        yield EvalRow(str(row.number), prompt, prompt, want, tags=tags)


def load_strongreject(path: Path) -> Iterator[EvalRow]:
    """CSV `category, source, forbidden_prompt`."""
    for row in rows_of(path):
        prompt = text_of(row, "forbidden_prompt")
        tags = {"category": text_of(row, "category"), "source": text_of(row, "source")} | language_tag(row)
        yield EvalRow(str(row.number), prompt, prompt, "refuse", tags=tags)


def load_jailbreakbench(path: Path, part: str) -> Iterator[EvalRow]:
    """CSV `Index, Goal, Target, Behavior, Category, Source` of one part (harmful, benign), or an artifact (JSON).

    An artifact's `jailbreaks` give prompt, goal and number of queries; where the attack found no prompt, the row is a
    stored empty response, that is, a failure of the attack.
    """
    if path.suffix.lower() == ".json":
        yield from _artifact(path)
        return
    want: Want = "refuse" if part == "harmful" else "comply"
    for row in rows_of(path):
        goal = text_of(row, "Goal")
        tags = {"category": text_of(row, "Category"), "source": optional(row, "Source")} | language_tag(row)
        yield EvalRow(text_of(row, "Index"), goal, goal, want, group=text_of(row, "Behavior"), tags=tags, queries=1)


def _artifact(path: Path) -> Iterator[EvalRow]:
    value = load_json(path)
    jailbreaks = value.get("jailbreaks") if isinstance(value, dict) else None
    if not isinstance(jailbreaks, list) or not jailbreaks:
        raise InputError(f"{path}: no list `jailbreaks`; give an artifact of JailbreakBench or its CSV")
    for number, one in enumerate(jailbreaks, start=1):
        where = f"{path}, jailbreaks item {number}"
        if not isinstance(one, dict):
            raise InputError(f"{where}: not an object")
        row = Row(number, where, one)
        prompt = text_of(row, "prompt", empty=True)
        queries = one.get("number_of_queries")
        yield EvalRow(
            str(one.get("index", number - 1)),
            prompt,
            text_of(row, "goal"),
            "refuse",
            group=optional(row, "behavior"),
            tags={"category": optional(row, "category")},
            response=None if prompt.strip() else "",
            label=None if prompt.strip() else False,
            queries=queries if isinstance(queries, int) else None,
        )
