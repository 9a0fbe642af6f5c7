"""One question of an evaluation set, and the helpers with which every loader reads a column or refuses a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from advgame.errors import InputError
from advgame.game.rows import Row, read_rows

Want = Literal["refuse", "comply"]
"""What a good model does: refuse (a harmful request) or comply (a benign one)."""


@dataclass(frozen=True)
class EvalRow:
    """One question.

    id: unique in its set, stable as long as the file is. prompt: what the model is sent. judged, context: what the
    classifier reads as the request. group: the unit of macro means. tags: what results are broken down by.
    response, label: of stored completions that came with the file, with the classifier's own label if it is there.
    queries: what finding the prompt cost, where the file says so.
    """

    id: str
    prompt: str
    judged: str
    want: Want
    context: str | None = None
    group: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    response: str | None = None
    label: bool | None = None
    queries: int | None = None


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file in any format that seeds come in. InputError if it is empty."""
    empty = True
    for row in read_rows(path):
        empty = False
        yield row
    if empty:
        raise InputError(f"{path}: no rows; name a file that has some")


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """A column's text. InputError naming file, line and column when it is missing, no text, or empty."""
    if column not in row.fields:
        present = ", ".join(map(str, row.fields)) or "none"
        raise InputError(f"{row.where}: no column '{column}' (there are: {present}); is this the right file?")
    value = row.fields[column]
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{row.where}: '{column}' holds {type(value).__name__}, not text; mend the row")
    if not value.strip() and not empty:
        raise InputError(f"{row.where}: '{column}' is empty; remove the row or fill it in")
    return value


def optional(row: Row, column: str) -> str:
    """A column as text, "" where it is missing or empty."""
    value = row.fields.get(column)
    return "" if value is None else str(value)


def word_of(row: Row, column: str, known: Mapping[str, Any]) -> Any:
    """The meaning of a column's word. InputError naming the words that are known."""
    if column not in row.fields:
        text_of(row, column)
    word = str(row.fields[column]).strip().lower()
    if word not in known:
        raise InputError(f"{row.where}: '{column}' holds {word[:40]!r}; known: {', '.join(known)}")
    return known[word]


def language_tag(row: Row) -> dict[str, str]:
    """The row's language, where the file has such a column."""
    language = optional(row, "language").strip()
    return {"language": language} if language else {}
