"""Seeds from files: which column is text and which category, and large files as sequences."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from advgame.errors import InputError
from advgame.game.rows import Row, decode_line, file_format, file_stem, parse_json_line, read_rows
from advgame.game.tree import Category, Seed

MAPPED = ("prompt", "category")
_SHORT = 200
"""Other columns come along in `Seed.meta` if their value is this short: every recorded tree repeats them."""


def read_seeds(path: Path, columns: Mapping[str, str] | None = None, category: str | None = None) -> Iterator[Seed]:
    """The seeds of a JSONL, JSON, CSV, TSV or Parquet file (see `rows.py`), in order, one at a time.

    Without `columns` the text is the column `prompt`, or else WildJailbreak's `vanilla` and, where that is
    empty or absent, its `adversarial`; the category is the column `category` or else WildJailbreak's
    `data_type`, whose values end in it (`adversarial_harmful`). `columns` maps `prompt` and `category` to
    other columns, for instance `{"prompt": "adversarial"}` or HarmBench's `{"prompt": "Behavior"}`;
    `category` fixes one for the whole file. `Seed.id` is the file's stem and the line (or row) number: stable
    as long as the file's name and order are.

    Raises:
        InputError: bad input, naming file and line; on the first `next`, or when a bad row is reached.
    """
    check_columns(columns, category)
    empty = True
    for row in read_rows(path):
        empty = False
        seed = seed_of_row(path, row, columns, category)
        if not seed.text:
            raise InputError(f"{row.where}: empty text; remove the row or fill it in")
        yield seed
    if empty:
        raise InputError(f"{path}: no rows; name a file that has some")


def check_columns(columns: Mapping[str, str] | None, category: str | None) -> None:
    """Whether a mapping and a fixed category make sense.

    Raises:
        InputError: unknown keys, an unknown category, or two sources for the category.
    """
    for key in columns or {}:
        if key not in MAPPED:
            raise InputError(f"columns: unknown key '{key}'; map {' or '.join(MAPPED)} to a column of the file")
    if category is not None and category not in set(Category):
        raise InputError(f"category: unknown category '{category}'; write {' or '.join(Category)}")
    if category is not None and "category" in (columns or {}):
        raise InputError("category: fixed, and mapped to a column as well; give one of the two")


def seed_of_row(path: Path, row: Row, columns: Mapping[str, str] | None, category: str | None) -> Seed:
    """The seed in a row; its text may be empty (`read_seeds` refuses that, `dataset.py` counts it).

    Raises:
        InputError: a missing column, a text that is no string, an unknown category.
    """
    columns = columns or {}
    text_column = columns.get("prompt") or _text_column(row)
    text = _string(row, text_column).strip()
    used = {text_column}
    category_column = columns.get("category") or ("category" if "category" in row.fields else "data_type")
    if category is None:
        used.add(category_column)
        found = _category(row, category_column)
    else:
        found = Category(category)
        stated = _parse_category(row.fields.get(category_column))
        if stated not in (None, found):
            mend = "leave the fixed category out"
            raise InputError(f"{row.where}: '{category_column}' says {stated}, not {category}; {mend}")
    meta = {k: str(v) for k, v in row.fields.items() if k not in used - {"data_type"} and _is_short(v)}
    return Seed(f"{file_stem(path)}:{row.number}", found, text, meta)


def _text_column(row: Row) -> str:
    if "prompt" in row.fields:
        return "prompt"
    if "adversarial" in row.fields and not _string(row, "vanilla", missing="").strip():
        return "adversarial"
    return "vanilla" if "vanilla" in row.fields else "prompt"


def _string(row: Row, column: str, missing: str | None = None) -> str:
    if column not in row.fields:
        if missing is not None:
            return missing
        raise _no_column(row, column, "prompt")
    value = row.fields[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"{row.where}: '{column}' holds {type(value).__name__}, not text; map 'prompt' to a text column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{row.where}: '{column}' holds half a surrogate pair; mend the \\u escape") from error
    return value


def _category(row: Row, column: str) -> Category:
    if column not in row.fields:
        raise _no_column(row, "category" if column == "data_type" else column, "category")
    value = row.fields[column]
    found = _parse_category(value)
    if found is None:
        allowed = " or ".join(Category)
        raise InputError(f"{row.where}: unknown category '{str(value)[:40]}' in '{column}'; write {allowed}")
    return found


def _parse_category(value: Any) -> Category | None:
    word = str(value).strip().lower().removeprefix("vanilla_").removeprefix("adversarial_")
    return Category(word) if word in set(Category) else None


def _no_column(row: Row, column: str, use: str) -> InputError:
    present = ", ".join(row.fields) or "none"
    fix = " or fix one category for the file" if use == "category" else ""
    return InputError(f"{row.where}: no column '{column}' (there are: {present}); map '{use}' to a column{fix}")


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float) and 0 < len(str(value)) <= _SHORT


class SeedFile(Sequence[Seed]):
    """The seeds of a file as a sequence; the whole file is read and checked once, when it is made.

    Of plain JSONL only byte offsets, line numbers and categories are kept (17 bytes a row), and a row is read
    from the file when it is asked for: the file may be larger than memory, and must not change meanwhile.
    Other formats have no place to jump to; their seeds are held in memory (`advgame data FILE --out DIR`
    makes JSONL of them).

    Raises:
        InputError: as `read_seeds`; and on reading a row of a file that was changed.
    """

    def __init__(self, path: Path, columns: Mapping[str, str] | None = None, category: str | None = None) -> None:
        self.path = path
        self._columns, self._category = columns, category
        self._offsets, self._numbers, self._benign = array("Q"), array("Q"), bytearray()
        self._seeds: list[Seed] = []
        indexed = file_format(path) == ".jsonl" and path.suffix.lower() != ".gz"
        check_columns(columns, category)
        self._stamp = _stamp(path) if indexed else None
        if not indexed:
            self._seeds = list(read_seeds(path, columns, category))
            self._benign = bytearray(seed.category is Category.BENIGN for seed in self._seeds)
            return
        for row in read_rows(path):
            seed = seed_of_row(path, row, columns, category)
            if not seed.text:
                raise InputError(f"{row.where}: empty text; remove the row or fill it in")
            self._offsets.append(row.offset)
            self._numbers.append(row.number)
            self._benign.append(seed.category is Category.BENIGN)
        if not self._benign:
            raise InputError(f"{path}: no rows; name a file that has some")

    def __len__(self) -> int:
        return len(self._benign)

    @overload
    def __getitem__(self, index: int) -> Seed: ...
    @overload
    def __getitem__(self, index: slice) -> list[Seed]: ...
    def __getitem__(self, index: int | slice) -> Seed | list[Seed]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._stamp is None:
            return self._seeds[index]
        number, offset = self._numbers[index], self._offsets[index]
        with self.path.open("rb") as file:
            if _stamp(self.path) != self._stamp:
                raise InputError(f"{self.path}: changed since it was indexed; leave it be while a run reads it")
            file.seek(offset)
            line = decode_line(self.path, number, file.readline())
        row = Row(number, f"{self.path} line {number}", parse_json_line(self.path, number, line), offset)
        return seed_of_row(self.path, row, self._columns, self._category)

    def rows_of(self, category: Category) -> array[int]:
        """The indices of the seeds of one category."""
        wanted = category is Category.BENIGN
        return array("Q", (i for i, benign in enumerate(self._benign) if benign == wanted))


class SeedPool(Sequence[Seed]):
    """The seeds of one category out of several files, in the order of the files."""

    def __init__(self, files: Sequence[SeedFile], category: Category) -> None:
        self._files = [(file, file.rows_of(category)) for file in files]

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._files)

    @overload
    def __getitem__(self, index: int) -> Seed: ...
    @overload
    def __getitem__(self, index: slice) -> list[Seed]: ...
    def __getitem__(self, index: int | slice) -> Seed | list[Seed]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        for file, rows in self._files:
            if 0 <= place < len(rows):
                return file[rows[place]]
            place -= len(rows)
        raise IndexError(f"seed {index} of {len(self)}")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; check the path") from error
    return status.st_size, status.st_mtime_ns
