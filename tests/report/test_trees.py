"""Trees on a page: what chunks and columns hold, flags, and the judge's statistics against numpy."""

import base64
import gzip
import json
import random
from array import array
from dataclasses import replace

import numpy as np
import pytest
from run_samples import attack, response, tree

from advgame.game.rewards import RewardRules, tree_rewards
from advgame.game.tree import Category, PairScore, Seed, Tree
from advgame.report import tree_store
from advgame.report.tree_stats import TreeStats, compared
from advgame.report.tree_store import FLAGS, LONGEST_TEXT, TreeStore, flags_of
from advgame.run.tree_codec import RecordedTree


def unpack(text):
    return gzip.decompress(base64.b64decode(text))


def stored(trees):
    chunks = []
    store = TreeStore(lambda number, text: chunks.append((number, text)))
    for one in trees:
        store.add(RecordedTree(one, tree_rewards(one, RewardRules())))
    store.flush()
    assert [number for number, _ in chunks] == list(range(store.chunks))
    return store.index(), [[json.loads(line) for line in unpack(text).split(b"\n")] for _, text in chunks]


def column(index, name, code):
    return list(array(code, unpack(index["columns"][name]["data"])))


def judged(category, *scores, faithful=True):
    """A tree of one attack with as many responses as scores."""
    responses = [response(f"answer {i}") for i in range(len(scores))]
    verdicts = [PairScore(i, i, None if score is None else (score, score)) for i, score in enumerate(scores)]
    one = attack("do it", responses, verdicts, faithful)
    return Tree(Seed("s", Category(category), "seed"), 0, 0, (one,), (0,), (PairScore(0, 0, (5.0, 5.0)),))


def names_of(one):
    bits = flags_of(one, tree_rewards(one, RewardRules()))
    return {name for bit, name in enumerate(FLAGS) if bits & (1 << bit)}


def test_chunks_and_columns_agree(monkeypatch):
    monkeypatch.setattr(tree_store, "CHUNK_TREES", 4)
    draw = random.Random(1)
    trees = [tree(step, index, draw) for step in range(3) for index in range(5)]
    index, chunks = stored(trees)
    assert [len(chunk) for chunk in chunks] == [4, 4, 4, 3]
    assert column(index, "chunk", "I") == [i // 4 for i in range(15)]
    assert column(index, "step", "I") == [i // 5 for i in range(15)]
    assert column(index, "category", "B") == [int(one.seed.category is Category.BENIGN) for one in trees]
    flat = [line for chunk in chunks for line in chunk]
    for one, line in zip(trees, flat, strict=True):
        assert line["seed"] == {"id": one.seed.id, "text": one.seed.text}
        assert [a["text"] for a in line["attacks"]] == [a.prompt for a in one.attacks]
        assert [r["text"] for a in line["attacks"] for r in a["responses"]] == [
            r.answer for a in one.attacks for r in a.responses
        ]
    best = [max(r for r in tree_rewards(one, RewardRules()).attacks if r is not None) for one in trees[:1]]
    assert column(index, "attacker", "f")[:1] == pytest.approx(best, rel=1e-6)


def test_text_that_cannot_be_encoded_and_text_without_end():
    _, [[line]] = stored([replace(judged("benign", 8.0), seed=Seed("s", Category.BENIGN, "a \udc80 b"))])
    assert line["seed"]["text"] == "a \udc80 b"
    _, [[line]] = stored([replace(judged("benign", 8.0), seed=Seed("s", Category.BENIGN, "y" * (LONGEST_TEXT + 7)))])
    assert line["seed"]["text"] == "y" * LONGEST_TEXT + " […7 more characters]"


def test_flags():
    assert "failed" in names_of(judged("harmful", 1.0, 9.0))
    assert "held" in names_of(judged("harmful", 3.0, 9.0))
    assert "failed" in names_of(judged("benign", 5.0))
    assert "held" in names_of(judged("benign", 5.5))
    assert names_of(judged("benign", None)) == {"no_verdict", "no_attacker_pair", "no_defender_pair"}
    assert "no_defender_pair" in names_of(judged("harmful", 4.0, 4.0))
    assert "attack_unfaithful" in names_of(judged("harmful", faithful=False))


def test_what_counts_as_a_comparison():
    pairwise = [PairScore(0, 1, (2.0, 5.0)), PairScore(0, 2, None), PairScore(1, 2, (1.0, float("nan")))]
    assert list(compared(pairwise)) == [(0, 1, 2.0, 5.0)]
    pointwise = [PairScore(i, i, (score, score)) for i, score in enumerate((1.0, 4.0, 9.0))]
    assert list(compared(pointwise)) == [(0, 1, 1.0, 4.0), (0, 2, 1.0, 9.0), (1, 2, 4.0, 9.0)]
    assert list(compared([PairScore(0, 0, (3.0, 3.0))])) == []


def test_judge_statistics_against_numpy():
    draw = random.Random(2)
    stats, rows = TreeStats(), []
    for step in range(30):
        for _ in range(4):
            lengths = [draw.randint(1, 50) for _ in range(2)]
            scores = [min(10.0, 0.1 * n + draw.uniform(0, 5)) for n in lengths]
            answers = [response("z" * n) for n in lengths]
            one = attack("p", answers, [PairScore(0, 1, tuple(scores))])
            seed = Seed("s", Category.HARMFUL, "seed")
            stats.add(step, Tree(seed, step, 0, (one,), (0,), ()))
            rows.append((scores[0] - scores[1], lengths[0] - lengths[1]))
    d, longer = np.array(rows).T
    [judge] = stats.table()
    assert judge["n"] == 120
    assert judge["length_correlation"] == pytest.approx(np.corrcoef(d, longer)[0, 1])
    assert judge["first_minus_second"] == pytest.approx(d.mean())
    assert judge["standard_error"] == pytest.approx(d.std(ddof=1) / np.sqrt(120))
    assert sum(judge["scores"]) == 240
    assert "judge/defender/harmful/length_correlation" not in stats.curves(), "four comparisons a step are too few"


def test_new_and_different_prompts():
    stats = TreeStats()
    for step, prompts in enumerate((["a", "a", "b", "c"], ["a", "d", "d", "d"])):
        for prompt in prompts:
            stats.add(step, Tree(Seed("s", Category.BENIGN, "seed"), step, 0, (attack(prompt, (), ()),), (None,), ()))
    curves = stats.curves()
    assert curves["benign/attacker/unique_prompts"].values == [0.75, 0.5]
    assert curves["benign/attacker/new_prompts"].values == [0.75, 0.25]
