"""`advgame data`: counts, duplicates, and a split that no duplicate crosses."""

from __future__ import annotations

import argparse
import random
import string
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame.errors import InputError
from advgame.game.dataset import add_data_arguments, deduplicate, describe, print_table, run_data, split
from advgame.game.duplicates import exact_groups, jaccard, near_groups, normalise
from advgame.game.seeds import read_seeds
from advgame.game.tree import Category, Seed


def a_text(draw: random.Random, words: int = 14) -> str:
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(words))


def some_seeds(count: int, seed: int = 0) -> list[Seed]:
    draw = random.Random(seed)
    return [Seed(f"s:{i}", list(Category)[i % 2], a_text(draw)) for i in range(count)]


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    return run_data(parser.parse_args([str(word) for word in words]))


def test_normalising():
    assert normalise("  Hello,\tWORLD!! ") == normalise("hello world") == "hello world"
    assert normalise("ﬁne　Ｃafé") == "fine café"
    assert normalise("?!") != normalise("...")


def test_exact_groups():
    assert exact_groups(["A b", "c", "a  b!", "c?"]) == [0, 1, 0, 1]


def true_groups(texts: list[str], threshold: float) -> list[int]:
    """Every pair compared: what MinHash approximates."""
    sets = [frozenset(t[i : i + 5] for i in range(max(len(t) - 5, 0) + 1)) for t in map(normalise, texts)]
    groups = list(range(len(texts)))
    for j in range(len(texts)):
        for i in range(j):
            if jaccard(sets[i], sets[j]) >= threshold and groups[i] != groups[j]:
                low, high = sorted((groups[i], groups[j]))
                groups = [low if g == high else g for g in groups]
    return groups


def test_near_groups_agree_with_all_pairs():
    draw = random.Random(1)
    texts: list[str] = []
    for _ in range(40):
        words = a_text(draw).split()
        texts.append(" ".join(words))
        for _ in range(draw.randint(0, 3)):
            changed = list(words)
            for _ in range(draw.randint(0, 2)):
                changed[draw.randrange(len(changed))] = a_text(draw, 1)
            texts.append(" ".join(changed).upper())
    texts += ["a", "b", "A!", "", "..."]
    assert near_groups(texts) == true_groups(texts, 0.8)
    assert near_groups(texts) == near_groups(texts)
    assert near_groups([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=8))
def test_near_groups_contain_exact_ones(texts: list[str]):
    near = near_groups(texts)
    for index, first in enumerate(exact_groups(texts)):
        assert near[index] == near[first]
        assert near[near[index]] == near[index] <= index


def test_a_bad_threshold():
    with pytest.raises(ValueError, match="threshold"):
        near_groups(["a"], 0.0)


def test_describe():
    seeds = [
        Seed("s:1", Category.HARMFUL, "abcd"),
        Seed("s:2", Category.HARMFUL, "ABCD!"),
        Seed("s:3", Category.BENIGN, "abcd"),
    ]
    about = describe(seeds, empty=2)
    assert (about.rows, about.empty, about.exact, about.near, about.conflicts) == (5, 2, 2, 2, 1)
    assert about.categories == {Category.HARMFUL: 2, Category.BENIGN: 1}
    assert about.lengths[Category.HARMFUL] == (4, 4, 4, 4, 5, 5, 5)


def test_deduplicate_keeps_the_first_of_each_category():
    base = a_text(random.Random(0), 30)
    seeds = [
        Seed("s:1", Category.HARMFUL, base),
        Seed("s:2", Category.HARMFUL, base.upper()),
        Seed("s:3", Category.HARMFUL, base + " x"),
        Seed("s:4", Category.BENIGN, base),
    ]
    assert [s.id for s in deduplicate(seeds, "exact")] == ["s:1", "s:3", "s:4"]
    assert [s.id for s in deduplicate(seeds, "near")] == ["s:1", "s:4"]
    with pytest.raises(ValueError, match="exact or near"):
        deduplicate(seeds, "all")


def test_a_split_is_stratified_and_decided_by_its_seed():
    seeds = some_seeds(200)
    train, validation = split(seeds, 0.1, 0)
    assert sorted(s.id for s in train + validation) == sorted(s.id for s in seeds)
    assert [sum(s.category is c for s in validation) for c in Category] == [10, 10]
    assert split(seeds, 0.1, 0) == (train, validation)
    assert split(seeds, 0.1, 1)[1] != validation


def test_no_near_duplicate_crosses_a_split():
    seeds = some_seeds(60)
    draw = random.Random(5)
    copies = [Seed(f"c:{i}", draw.choice(list(Category)), draw.choice(seeds).text.upper() + " zz") for i in range(60)]
    everything = seeds + copies
    train, validation = split(everything, 0.25, 3)
    assert validation
    groups = near_groups([s.text for s in everything])
    group_of = {s.id: g for s, g in zip(everything, groups, strict=True)}
    assert len(set(groups)) < len(everything)
    assert not {group_of[s.id] for s in train} & {group_of[s.id] for s in validation}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction: float):
    with pytest.raises(InputError, match="between 0 and 1"):
        split(some_seeds(4), fraction, 0)


def test_duplicates_only_cannot_be_split():
    seeds = [Seed(f"s:{i}", Category.BENIGN, "one text") for i in range(9)]
    with pytest.raises(InputError, match="1 groups"):
        split(seeds, 0.2, 0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "mine.csv"
    lines = [f"{s.text},{s.category.value}" for s in some_seeds(40)]
    path.write_text("\n".join(["body,kind", *lines, lines[0], ",benign"]))
    mapping = ("--columns", "prompt=body", "--columns", "category=kind")
    assert run(path, *mapping) == 0
    shown = capsys.readouterr().out
    assert "mine.csv" in shown
    assert "exact duplicates" in shown
    assert run(path, *mapping, "--dedup", "near", "--split", "0.2", "--out", tmp_path / "out") == 0
    assert "1 rows dropped, 40 kept" in capsys.readouterr().out
    train = list(read_seeds(tmp_path / "out" / "mine.train.jsonl"))
    validation = list(read_seeds(tmp_path / "out" / "mine.validation.jsonl"))
    assert (len(train), len(validation)) == (32, 8)
    assert train[0].meta["source"].startswith("mine:")
    assert run(path, *mapping, "--out", tmp_path / "whole") == 0
    assert len(list(read_seeds(tmp_path / "whole" / "mine.jsonl"))) == 41
    assert not list(tmp_path.rglob("*.part"))


def test_command_refusals(tmp_path: Path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "a", "category": "benign"}\n{"prompt": "bcd", "category": "benign"}\n')
    with pytest.raises(InputError, match="give --out"):
        run(path, "--split", "0.5")
    assert run(path, "--split", "0.5", "--out", tmp_path) == 0
    (tmp_path / "s.train.jsonl").unlink()
    with pytest.raises(InputError, match=r"s\.validation\.jsonl: exists already"):
        run(path, "--split", "0.5", "--out", tmp_path)
    assert not (tmp_path / "s.train.jsonl").exists()
    with pytest.raises(InputError, match="exists already"):
        run(path, "--out", tmp_path)
    with pytest.raises(InputError, match="not OURS=THEIRS"):
        run(path, "--columns", "prompt")
    path.write_text('{"prompt": "", "category": "benign"}\n')
    assert run(path) == 0
    with pytest.raises(InputError, match="every text is empty"):
        run(path, "--out", tmp_path / "out")


def test_the_table_needs_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_table("title", [("", "rows"), ("benign", "12")])
    assert capsys.readouterr().out.splitlines()[:3] == ["title", "        rows", "benign    12"]
