"""`advgame data`: describes a seed file, drops duplicates, splits it without letting a duplicate cross."""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advgame.errors import InputError
from advgame.game.duplicates import exact_groups, near_groups
from advgame.game.rows import file_stem, read_rows
from advgame.game.seeds import check_columns, seed_of_row
from advgame.game.tree import Category, Seed

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Description:
    """What a seed file holds.

    `lengths` are the percentiles `PERCENTILES` of the texts' lengths in characters, per category. A duplicate
    is a row with an earlier twin of any category; `conflicts` counts the exact ones whose twin has the other
    category.
    """

    rows: int
    empty: int
    categories: Mapping[Category, int]
    lengths: Mapping[Category, tuple[int, ...]]
    exact: int
    near: int
    conflicts: int


def load_rows(
    path: Path, columns: Mapping[str, str] | None = None, category: str | None = None
) -> tuple[list[Seed], int]:
    """All seeds of a file that have a text, and the number of those that have none.

    Raises:
        InputError: as `read_seeds`, but empty texts are counted instead.
    """
    check_columns(columns, category)
    seeds = [seed_of_row(path, row, columns, category) for row in read_rows(path)]
    if not seeds:
        raise InputError(f"{path}: no rows; name a file that has some")
    full = [seed for seed in seeds if seed.text]
    return full, len(seeds) - len(full)


def describe(seeds: Sequence[Seed], empty: int = 0) -> Description:
    """Counts, lengths and duplicates of `seeds`; near duplicates include exact ones."""
    texts = [seed.text for seed in seeds]
    exact, near = exact_groups(texts), near_groups(texts)
    by_category = {c: sorted(len(s.text) for s in seeds if s.category is c) for c in Category}
    return Description(
        rows=len(seeds) + empty,
        empty=empty,
        categories={c: len(lengths) for c, lengths in by_category.items()},
        lengths={c: tuple(_percentile(n, p) for p in PERCENTILES) for c, n in by_category.items() if n},
        exact=_repeats(exact),
        near=_repeats(near),
        conflicts=sum(seeds[i].category is not seeds[first].category for i, first in enumerate(exact)),
    )


def deduplicate(seeds: Sequence[Seed], kind: str) -> list[Seed]:
    """`seeds` without the later members of each group of duplicates; `kind` is "exact" or "near".

    Groups are found within a category: the same text as harmful and as benign is a conflict that `describe`
    counts, and not ours to decide.

    Raises:
        ValueError: another `kind`.
    """
    if kind not in ("exact", "near"):
        raise ValueError(f"duplicates are exact or near, not '{kind}'")
    kept: set[str] = set()
    for category in Category:
        members = [seed for seed in seeds if seed.category is category]
        texts = [seed.text for seed in members]
        groups = exact_groups(texts) if kind == "exact" else near_groups(texts)
        kept |= {members[i].id for i, first in enumerate(groups) if i == first}
    return [seed for seed in seeds if seed.id in kept]


def split(seeds: Sequence[Seed], fraction: float, seed: int) -> tuple[list[Seed], list[Seed]]:
    """Train and validation seeds, `fraction` of each category (at least one) in the latter.

    A group of near duplicates goes to one side as a whole, also across categories. Groups are drawn in an
    order that `seed` decides and taken while they fit, so a large group may leave validation somewhat short.
    Both keep the order of the file.

    Raises:
        InputError: a fraction that is not between 0 and 1, or duplicates that leave one side empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--split: {fraction} is not a fraction; write a number between 0 and 1, like 0.1")
    groups: dict[int, list[int]] = {}
    for index, first in enumerate(near_groups([s.text for s in seeds])):
        groups.setdefault(first, []).append(index)
    totals = {c: sum(s.category is c for s in seeds) for c in Category}
    room = {c: max(1, round(fraction * n)) if n > 1 else 0 for c, n in totals.items()}
    draw = random.Random(f"{seed}/split")
    order = sorted(groups, key={first: draw.random() for first in groups}.__getitem__)
    held: set[int] = set()
    for first in order:
        counts = {c: sum(seeds[i].category is c for i in groups[first]) for c in Category}
        if all(counts[c] <= room[c] for c in Category):
            held.update(groups[first])
            room = {c: room[c] - counts[c] for c in Category}
    train = [s for i, s in enumerate(seeds) if i not in held]
    validation = [s for i, s in enumerate(seeds) if i in held]
    if not train or not validation:
        raise InputError(
            f"--split: {len(seeds)} rows in {len(groups)} groups of near duplicates cannot be split; "
            "add rows or choose another fraction"
        )
    return train, validation


def write_seeds(path: Path, seeds: Sequence[Seed]) -> None:
    """Writes JSONL that `read_seeds` reads (`source` holds the old id); it appears only when complete.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    if path.exists():
        raise InputError(f"{path}: exists already; remove it or choose another --out")
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for seed in seeds:
                row = {"prompt": seed.text, "category": seed.category.value, "source": seed.id}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; choose another --out") from error


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `advgame data`."""
    parser.add_argument("file", type=Path, help="seed file: JSONL, JSON, CSV, TSV (or .gz of these), Parquet")
    parser.add_argument("--split", type=float, metavar="FRACTION", help="split off this share for validation")
    parser.add_argument("--seed", type=int, default=0, help="decides the split (default 0)")
    parser.add_argument("--dedup", choices=("exact", "near"), help="drop later duplicates within a category")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the resulting JSONL files go")
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="which column is our prompt or category, like prompt=Behavior; may be repeated",
    )
    parser.add_argument("--category", choices=tuple(c.value for c in Category), help="category of every row")


def run_data(args: argparse.Namespace) -> int:
    """Prints the description; with `--out` writes what is left after `--dedup`, or the sides of `--split`.

    Empty rows are counted and not written. Returns 0.

    Raises:
        InputError: bad input, or `--split` without `--out`.
    """
    if args.split is not None and args.out is None:
        raise InputError("--split: nowhere to write; give --out DIR")
    seeds, empty = load_rows(args.file, _mapping(args.columns), args.category)
    print_table(args.file.name, table_rows(describe(seeds, empty)))
    if args.dedup:
        kept = deduplicate(seeds, args.dedup)
        print(f"--dedup {args.dedup}: {len(seeds) - len(kept)} rows dropped, {len(kept)} kept")
        seeds = kept
    if args.out is None:
        return 0
    if not seeds:
        raise InputError(f"{args.file}: every text is empty, nothing to write; fill some in")
    stem = file_stem(args.file)
    parts = {f"{stem}.jsonl": seeds}
    if args.split is not None:
        train, validation = split(seeds, args.split, args.seed)
        parts = {f"{stem}.train.jsonl": train, f"{stem}.validation.jsonl": validation}
    for name in parts:
        # Looked at before the first is written, so that no half of a split is left behind.
        if (args.out / name).exists():
            raise InputError(f"{args.out / name}: exists already; remove it or choose another --out")
    for name, part in parts.items():
        write_seeds(args.out / name, part)
        counts = ", ".join(f"{sum(s.category is c for s in part)} {c}" for c in Category)
        print(f"{args.out / name}: {len(part)} rows ({counts})")
    return 0


def table_rows(about: Description) -> list[tuple[str, ...]]:
    """A description as a table: header, one row a category, and the counts of the whole file."""
    rows = [("", "rows", *(f"p{p}" if 0 < p < 100 else ("min", "max")[p > 0] for p in PERCENTILES))]
    for category, count in about.categories.items():
        lengths = about.lengths.get(category)
        rows.append((category.value, str(count), *(map(str, lengths) if lengths else ("-",) * len(PERCENTILES))))
    whole = {
        "all": about.rows,
        "empty": about.empty,
        "exact duplicates": about.exact,
        "near duplicates": about.near,
        "in both categories": about.conflicts,
    }
    return rows + [(name, str(count), *("",) * len(PERCENTILES)) for name, count in whole.items()]


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows`, the first of them as a header, with rich if it is installed."""
    caption = "lengths in characters; near duplicates include exact ones"
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        print(title)
        for row in rows:
            first, *others = (
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join([first, *others]).rstrip())
        print(caption)
        return
    table = Table(title=Text(title), caption=caption)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def _mapping(pairs: Sequence[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--columns: '{pair}' is not OURS=THEIRS; write for instance prompt=Behavior")
        columns[ours] = theirs
    return columns


def _percentile(values: Sequence[int], percent: int) -> int:
    """Nearest rank: always a length that occurs."""
    return values[max(0, -(-percent * len(values) // 100) - 1)]


def _repeats(groups: Sequence[int]) -> int:
    return sum(index != first for index, first in enumerate(groups))
