"""Seeds: every format and column convention, every bad input named, a stream that resumes by step alone."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame.errors import InputError
from advgame.game.seeds import SeedFile, SeedPool, read_seeds
from advgame.game.stream import SeedStream
from advgame.game.tree import Category, Seed

ROWS = [
    {"prompt": "how do kites fly", "category": "benign"},
    {"prompt": 'a text, with\ntwo lines and a "quote"', "category": "harmful"},
    {"prompt": "日本語 é", "category": "benign"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format that the file's name says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file)
        else:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "tsv", "parquet"])
def test_every_format_gives_the_same_seeds(tmp_path: Path, kind: str):
    path = write(tmp_path / f"some.seeds.{kind}", ROWS)
    seeds = list(read_seeds(path))
    assert [(s.text, s.category.value) for s in seeds] == [(r["prompt"], r["category"]) for r in ROWS]
    assert seeds[0].id == ("some.seeds:2" if kind[:3] in ("csv", "tsv") else "some.seeds:1")
    assert len({s.id for s in seeds}) == 3
    assert list(SeedFile(path)) == seeds
    assert SeedFile(path)[-1] == seeds[-1]
    assert SeedFile(path)[1:] == seeds[1:]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(
        "\ufeff".encode() + b'\r\n{"prompt": " a ", "category": "Benign"}\r\n \r\n'
        b'{"prompt": "b", "category": "harmful"}'
    )
    seeds = list(read_seeds(path))
    assert [(s.id, s.text) for s in seeds] == [("s:2", "a"), ("s:4", "b")]
    assert list(SeedFile(path)) == seeds
    table = tmp_path / "s.csv"
    table.write_bytes("\ufeff".encode() + b'prompt,category\r\n"a\r\nb",benign\r\n\r\nc,harmful\r\n')
    assert [(s.id, s.text) for s in read_seeds(table)] == [("s:2", "a\r\nb"), ("s:5", "c")]


WILD = [
    {"vanilla": "v1", "adversarial": "", "data_type": "vanilla_harmful", "completion": "x" * 999},
    {"vanilla": "v2", "adversarial": "a2", "data_type": "adversarial_benign", "completion": ""},
    {"vanilla": "", "adversarial": "a3", "data_type": "adversarial_harmful", "completion": ""},
]


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_wildjailbreak_columns(tmp_path: Path, kind: str):
    seeds = list(read_seeds(write(tmp_path / f"w.{kind}", WILD)))
    assert [s.text for s in seeds] == ["v1", "v2", "a3"]
    assert [s.category.value for s in seeds] == ["harmful", "benign", "harmful"]
    assert seeds[1].meta == {"adversarial": "a2", "data_type": "adversarial_benign"}
    assert "completion" not in seeds[0].meta


def test_wildjailbreak_adversarial_text_when_asked(tmp_path: Path):
    path = write(tmp_path / "w.tsv", WILD[1:])
    assert [s.text for s in read_seeds(path, {"prompt": "adversarial"})] == ["a2", "a3"]


def test_wildjailbreak_evaluation_columns(tmp_path: Path):
    rows = [{"adversarial": "a", "label": 1, "data_type": "adversarial_harmful"}]
    for kind in ("tsv", "jsonl"):
        (seed,) = read_seeds(write(tmp_path / f"e.{kind}", rows))
        assert (seed.text, seed.category) == ("a", Category.HARMFUL)
        assert seed.meta == {"label": "1", "data_type": "adversarial_harmful"}


def test_null_counts_as_empty(tmp_path: Path):
    rows = [{"vanilla": None, "adversarial": "a", "data_type": "adversarial_benign"}]
    assert [s.text for s in read_seeds(write(tmp_path / "n.jsonl", rows))] == ["a"]


def test_other_data_sets_through_the_mapping(tmp_path: Path):
    behaviours = write(tmp_path / "h.csv", [{"Behavior": "b1", "SemanticCategory": "x", "BehaviorID": "id1"}])
    (seed,) = read_seeds(behaviours, {"prompt": "Behavior"}, "harmful")
    assert (seed.text, seed.category, seed.meta["BehaviorID"]) == ("b1", Category.HARMFUL, "id1")
    topics = write(tmp_path / "o.csv", [{"prompt": "p", "category": "deception"}])
    assert [s.category.value for s in read_seeds(topics, category="benign")] == ["benign"]
    renamed = write(tmp_path / "r.csv", [{"text": "p", "kind": "benign"}])
    assert [s.text for s in read_seeds(renamed, {"prompt": "text", "category": "kind"})] == ["p"]


GOOD = b'{"prompt": "a", "category": "benign"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("s.jsonl", GOOD + b"{oops\n", ["s.jsonl line 2", "not valid JSON"]),
        ("s.jsonl", GOOD + b"[1]\n", ["s.jsonl line 2", "a list", "object"]),
        ("s.jsonl", b"[" * 100_000 + b"\n", ["s.jsonl line 1", "not valid JSON"]),
        ("s.jsonl", GOOD + b'\n{"text": "a"}\n', ["line 3", "no column 'prompt'", "there are: text"]),
        ("s.jsonl", b'{"prompt": "a"}\n', ["line 1", "no column 'category'", "fix one category"]),
        ("s.jsonl", b'{"prompt": "a", "category": "bad"}\n', ["line 1", "'bad'", "harmful or benign"]),
        ("s.jsonl", b'{"prompt": "a", "category": null}\n', ["line 1", "'None'", "harmful or benign"]),
        ("s.jsonl", GOOD + b'{"prompt": " ", "category": "benign"}\n', ["line 2", "empty text"]),
        ("s.jsonl", b'{"prompt": ["a"], "category": "benign"}\n', ["line 1", "'prompt' holds list"]),
        ("s.jsonl", b'{"prompt": "\\ud800", "category": "benign"}\n', ["line 1", "surrogate"]),
        ("s.jsonl", b'{"adversarial": "a", "data_type": "x"}', ["line 1", "'x' in 'data_type'"]),
        ("s.jsonl", GOOD + b'{"prompt": "\xff", "category": "benign"}\n', ["line 2", "not UTF-8"]),
        ("s.jsonl", GOOD.decode().encode("utf-16"), ["line 1", "not UTF-8"]),
        ("s.jsonl", b"", ["s.jsonl", "no rows"]),
        ("s.jsonl", b"\n \n", ["s.jsonl", "no rows"]),
        ("s.jsonl.gz", b"not gzip", ["s.jsonl.gz", "damaged gzip"]),
        ("s.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], ["s.jsonl.gz", "damaged gzip"]),
        ("s.json", GOOD + GOOD, ["s.json line 2", "name it .jsonl"]),
        ("s.json", GOOD, ["s.json", "an object where a list"]),
        ("s.json", b"[1]", ["s.json item 1", "a number"]),
        ("s.json", b"", ["s.json", "no rows"]),
        ("s.csv", b"prompt,category\n", ["s.csv", "no rows"]),
        ("s.csv", b'prompt,category\na,benign\n"b,benign\nc,benign\n', ["s.csv line 3", "quote"]),
        ("s.csv", b"prompt,category\na,benign,x\n", ["s.csv line 2", "3 cells", "header has 2"]),
        ("s.csv", b"prompt,prompt\na,b\n", ["s.csv line 1", "two columns"]),
        ("s.csv", b"text,category\na,benign\n", ["s.csv line 2", "there are: text, category"]),
        ("s.tsv", b"prompt\tcategory\n\xff\tbenign\n", ["s.tsv line 2", "not UTF-8"]),
        ("s.parquet", b"PAR0", ["s.parquet", "Parquet"]),
        ("s.txt", b"a", ["s.txt", "unsupported", ".jsonl"]),
        ("s.parquet.gz", b"a", ["s.parquet.gz", "unsupported"]),
        ("seeds", b"a", ["seeds", "unsupported"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, words: list[str]):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (lambda: list(read_seeds(path)), lambda: SeedFile(path)):
        with pytest.raises(InputError) as error:
            read()
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\n" not in str(error.value)


def test_bad_arguments_are_named(tmp_path: Path):
    path = write(tmp_path / "s.jsonl", ROWS)
    for columns, category, words in [
        ({"text": "prompt"}, None, "unknown key 'text'"),
        (None, "nice", "unknown category 'nice'"),
        ({"category": "category"}, "benign", "give one of the two"),
        (None, "benign", "line 2: 'category' says harmful"),
        ({"prompt": "body"}, None, "no column 'body'"),
    ]:
        with pytest.raises(InputError, match=words):
            list(read_seeds(path, columns, category))
    for missing in (tmp_path / "no.jsonl", tmp_path / "no.csv", tmp_path / "no.parquet"):
        with pytest.raises(InputError, match="no such file"):
            SeedFile(missing)
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        SeedFile(tmp_path / "d.jsonl")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str, *args: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(InputError, match=r"pip install 'advgame\[train\]'"):
        next(read_seeds(tmp_path / "s.parquet"))


def test_a_changed_file_is_noticed(tmp_path: Path):
    path = write(tmp_path / "s.jsonl", ROWS)
    seeds = SeedFile(path)
    path.write_bytes(GOOD * 9)
    with pytest.raises(InputError, match="changed since"):
        seeds[0]


def test_seeds_are_read_on_demand_and_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s.jsonl"
    path.write_bytes(GOOD + b"{broken\n")
    assert next(read_seeds(path)).id == "s:1", "streaming reaches the bad line only when asked to"
    path = write(tmp_path / "many.jsonl", ROWS * 50)
    seeds = SeedFile(path)
    opened = 0
    really_open = Path.open

    def counted(self: Path, *args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        opened += 1
        return really_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    assert seeds[147].text == ROWS[0]["prompt"]
    assert opened == 1
    with pytest.raises(IndexError):
        seeds[150]


def test_pools_take_one_category_from_several_files(tmp_path: Path):
    files = [SeedFile(write(tmp_path / name, ROWS)) for name in ("a.jsonl", "b.csv")]
    benign = SeedPool(files, Category.BENIGN)
    assert [s.id for s in benign] == ["a:1", "a:3", "b:2", "b:5"]
    assert benign[-1].id == "b:5"
    assert [s.id for s in benign[1:3]] == ["a:3", "b:2"]
    assert len(SeedPool(files, Category.HARMFUL)) == 2
    assert len(SeedPool([], Category.HARMFUL)) == 0
    with pytest.raises(IndexError):
        benign[4]


def pool(category: Category, count: int) -> list[Seed]:
    return [Seed(f"{category.value}:{i}", category, f"text {i}") for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_stream_resumes_anywhere_and_plays_every_seed_once_an_epoch(harmful, benign, bh, bb, seed):
    pools = pool(Category.HARMFUL, harmful), pool(Category.BENIGN, benign)
    run = SeedStream(*pools, seed, bh, bb)
    batches = [run.batch(step) for step in range(13)]
    for step in (12, 5, 0, 7):
        assert SeedStream(*pools, seed, bh, bb).batch(step) == batches[step] == run.batch(step)
    for batch in batches:
        assert [s.category for s in batch] == [Category.HARMFUL] * bh + [Category.BENIGN] * bb
    order = [s.id for batch in batches for s in batch if s.category is Category.BENIGN]
    for start in range(0, len(order) - benign + 1, benign):
        assert len(set(order[start : start + benign])) == benign


def test_epochs_and_run_seeds_differ_and_the_order_is_pinned():
    pools = pool(Category.HARMFUL, 20), pool(Category.BENIGN, 20)
    run = SeedStream(*pools, 0, 20, 20)
    first, second = ([s.id for s in run.batch(step)] for step in (0, 1))
    assert first != second
    assert Counter(first) == Counter(second)
    assert [i.split(":")[1] for i in first[:20]] != [i.split(":")[1] for i in first[20:]]
    assert first != [s.id for s in SeedStream(*pools, 1, 20, 20).batch(0)]
    # A run that is resumed by a later release must meet the same seeds.
    small = SeedStream(pool(Category.HARMFUL, 5), [], 0, 5, 0)
    assert [s.id.split(":")[1] for s in small.batch(0)] == ["0", "2", "4", "3", "1"]


@pytest.mark.parametrize(
    ("harmful", "benign", "bh", "bb", "words"),
    [
        (0, 3, 1, 1, "no harmful seeds, but 1 a step"),
        (3, 0, 1, 2, "no benign seeds, but 2 a step"),
        (3, 3, 0, 0, "both batches"),
        (3, 3, -1, 1, "negative"),
    ],
)
def test_impossible_streams_are_refused(harmful, benign, bh, bb, words):
    with pytest.raises(InputError, match=words):
        SeedStream(pool(Category.HARMFUL, harmful), pool(Category.BENIGN, benign), 0, bh, bb)


def test_one_empty_category_is_fine_with_batch_zero():
    stream = SeedStream([], pool(Category.BENIGN, 3), 0, 0, 2)
    assert len(stream.batch(4)) == 2
    with pytest.raises(ValueError, match="count from 0"):
        stream.batch(-1)
