"""HarmBench: behaviours (CSV), test cases and stored completions (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advgame.errors import InputError
from advgame.evals.row import EvalRow, language_tag, optional, rows_of, text_of
from advgame.game.rows import Row, decode_line

CONTEXT = "{context}\n\n---\n\n{behavior}"
"""The prompt of a contextual behaviour in HarmBench's own convention."""

SUBSETS = ("all", "standard", "contextual", "copyright")


@dataclass(frozen=True)
class Behaviour:
    text: str
    context: str
    tags: Mapping[str, str]


def behaviours(path: Path) -> Iterator[tuple[str, Behaviour]]:
    """(BehaviorID, behaviour) of a behaviours CSV, in order. InputError: a missing column, an id that comes twice."""
    seen: dict[str, str] = {}
    for row in rows_of(path):
        name = text_of(row, "BehaviorID")
        if name in seen:
            raise InputError(f"{row.where}: BehaviorID {name!r} was on {seen[name]} already; remove one of them")
        seen[name] = row.where.rpartition(path.name)[2].strip()
        tags = {
            "functional": optional(row, "FunctionalCategory") or "standard",
            "semantic": optional(row, "SemanticCategory"),
        } | language_tag(row)
        yield name, Behaviour(text_of(row, "Behavior"), text_of(row, "ContextString", empty=True).strip(), tags)


def load_behaviours(path: Path, *, native: bool, subset: str = "all") -> Iterator[EvalRow]:
    """One row a behaviour. native: contextual prompts carry their context, and the classifier sees it; otherwise (the
    convention of safety-eval) the behaviour's text alone is asked and judged.
    """
    found = False
    for name, one in behaviours(path):
        if subset not in ("all", one.tags["functional"]):
            continue
        found = True
        with_context = native and bool(one.context)
        prompt = CONTEXT.format(context=one.context, behavior=one.text) if with_context else one.text
        context = one.context if with_context else None
        yield EvalRow(name, prompt, one.text, "refuse", context, group=name, tags=one.tags)
    if not found:
        raise InputError(f"{path}: no behaviour is of the subset {subset!r}; choose one of {', '.join(SUBSETS)}")


def load_cases(path: Path, behaviours_path: Path) -> Iterator[EvalRow]:
    """One row a test case, or a stored completion with its label, of a JSON file; behaviours come from their CSV.

    Forms: a list of {BehaviorID, test_case[, generation][, label]}; or {BehaviorID: [test case, or
    {test_case[, generation][, label]}]}.
    """
    known = dict(behaviours(behaviours_path))
    counts: dict[str, int] = {}
    for where, name, case in _cases(path):
        if name not in known:
            raise InputError(f"{where}: BehaviorID {name!r} is not in {behaviours_path}; name the file that has it")
        row = Row(0, where, case)
        number = counts[name] = counts.get(name, -1) + 1
        label = case.get("label")
        if label not in (None, 0, 1, -1):
            raise InputError(f"{where}: label {label!r}; write 1 (success), 0, or -1 (unknown)")
        generation = text_of(row, "generation", empty=True) if "generation" in case else None
        one = known[name]
        tags = dict(one.tags) | {key: str(case[key]) for key in ("method", "model") if case.get(key)}
        yield EvalRow(
            f"{name}#{number}",
            text_of(row, "test_case"),
            one.text,
            "refuse",
            one.context or None,
            group=name,
            tags=tags,
            response=generation,
            label=None if label in (None, -1) else bool(label),
        )


def _cases(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    value = load_json(path)
    if isinstance(value, list):
        for number, case in enumerate(value, start=1):
            where = f"{path} item {number}"
            if not isinstance(case, dict):
                raise InputError(f"{where}: not an object; write {{BehaviorID, test_case}}")
            yield where, text_of(Row(number, where, case), "BehaviorID"), case
    elif isinstance(value, dict):
        for name, cases in value.items():
            if not isinstance(cases, list):
                raise InputError(f"{path}, {name!r}: not a list; write the test cases of a behaviour as a list")
            for number, case in enumerate(cases, start=1):
                where = f"{path}, {name!r} item {number}"
                if not isinstance(case, str | dict):
                    raise InputError(f"{where}: neither text nor an object; write a test case")
                yield where, name, {"test_case": case} if isinstance(case, str) else case
    else:
        raise InputError(f"{path}: neither a list nor an object of test cases; is this the right file?")
    if not value:
        raise InputError(f"{path}: no test cases; name a file that has some")


def load_json(path: Path) -> Any:
    """A whole JSON file. InputError naming the line."""
    try:
        text = "".join(decode_line(path, n, raw) for n, raw in enumerate(path.open("rb"), start=1))
        return json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; check the path") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not valid JSON ({error.msg}); mend it there") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({type(error).__name__})") from error
