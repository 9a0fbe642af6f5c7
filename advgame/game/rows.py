"""Streams the rows of a data file, whatever its format, with a place to name in an error.

JSONL, JSON list, CSV and TSV (each also gzipped) and Parquet; UTF-8 with or without a byte-order mark, either
line ending, blank lines skipped. One row is in memory at a time, except for JSON lists (all) and Parquet (a
batch).
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from advgame.errors import InputError

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv")
FORMATS = (*TEXT_FORMATS, ".parquet")
_PARQUET_BATCH = 256


@dataclass(frozen=True)
class Row:
    """One row: its fields, its number (line of a text file, else count from 1), and where to say it stands.

    `offset` is the byte at which its line begins, in plain JSONL only.
    """

    number: int
    where: str
    fields: Mapping[str, Any]
    offset: int = 0


def file_format(path: Path) -> str:
    """The extension that decides the format (`.gz` set aside).

    Raises:
        InputError: an extension that is not read here.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    extension = suffixes[-2:-1] if zipped else suffixes[-1:]
    known = TEXT_FORMATS if zipped else FORMATS
    if not extension or extension[0] not in known:
        names = ", ".join((*FORMATS, *(f"{name}.gz" for name in TEXT_FORMATS)))
        raise InputError(f"{path}: unsupported file extension; convert it to one of {names}")
    return extension[0]


def file_stem(path: Path) -> str:
    """The file's name without its extension and `.gz`."""
    name = path.name[: -len(".gz")] if path.suffix.lower() == ".gz" else path.name
    return Path(name).stem


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path` in order.

    Raises:
        InputError: the file is missing, unreadable, of an unsupported extension, not UTF-8, or not what its
        extension
            says; the message names the line or row.
    """
    extension = file_format(path)
    if extension == ".parquet":
        yield from _parquet(path)
        return
    try:
        with _open(path) as file:
            if extension == ".jsonl":
                yield from _jsonl(path, file)
            elif extension == ".json":
                yield from _json(path, file)
            else:
                yield from _table(path, file, "," if extension == ".csv" else "\t")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}); copy or compress it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_json_line(path: Path, number: int, line: str) -> Mapping[str, Any]:
    """One line of JSONL as an object.

    Raises:
        InputError: it is not a JSON object.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(f"{path} line {number}: not valid JSON ({reason}); write one object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} line {number}: {_kind(value)} where an object is needed; write one object a line")
    return value


def decode_line(path: Path, number: int, raw: bytes) -> str:
    """One line as text, a byte-order mark at the start of the file removed.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} line {number}: not UTF-8 (byte {error.start} of the line); save it as UTF-8"
        ) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _unreadable(path: Path, error: OSError) -> InputError:
    mend = "check the path" if isinstance(error, FileNotFoundError) else "check that it is a file you may read"
    return InputError(f"{path}: {(error.strerror or str(error)).lower()}; {mend}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _jsonl(path: Path, file: BinaryIO) -> Iterator[Row]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        line = decode_line(path, number, raw)
        if line.strip():
            yield Row(number, f"{path} line {number}", parse_json_line(path, number, line), offset)
        offset += len(raw)


def _json(path: Path, file: BinaryIO) -> Iterator[Row]:
    text = "".join(decode_line(path, number, raw) for number, raw in enumerate(file, start=1))
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        mend = "name it .jsonl if it holds one object a line" if error.msg == "Extra data" else "mend it there"
        raise InputError(f"{path} line {error.lineno}: not valid JSON ({error.msg}); {mend}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({type(error).__name__}); write a list of objects") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: {_kind(values)} where a list of objects is needed; put the rows in one list")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{path} item {number}: {_kind(value)} where an object is needed; write a list of objects")
        yield Row(number, f"{path} item {number}", value)


def _table(path: Path, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    lines = (decode_line(path, number, raw) for number, raw in enumerate(file, start=1))
    # Strict, since the lenient reader swallows the rest of a file whose quote was never closed.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        where = f"{path} line {number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            mend = 'look for a quote that is not closed, or not doubled ("")'
            raise InputError(f"{where}: not a valid table row ({error}); {mend}") from error
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) < len(header):
                raise InputError(f"{where}: two columns have one name ({', '.join(header)}); rename one")
        elif len(cells) != len(header):
            mend = "mend the row, or quote cells that hold the separator"
            raise InputError(f"{where}: {len(cells)} cells where the header has {len(header)}; {mend}")
        else:
            yield Row(number, where, dict(zip(header, cells, strict=True)))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow; run: pip install 'advgame[train]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{path} row {number}", fields)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable Parquet file ({reason}); write it again") from error
