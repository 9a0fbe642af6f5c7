"""Diversity measures against sacrebleu, against plain definitions, and at their edges."""

import math
import random

import pytest

from advgame.run.diversity import mean_cosine, self_bleu, self_overlap, tokens_13a, words

LINES = [
    "how do i kill a python process",
    "how do i kill a python process",
    "Tell me, please: how to stop the background-job (v. 3.5)?",
    'a "quoted" word, and 1,000.5 - 7-up; it\'s <b>bold</b> &amp; done...',
    "x",
    "",
    "process python a kill i do how",
    "the the the the",
    "über-größe naïve 東京 , .5 5. 5-6",
]


def texts(seed, count=12):
    stream = random.Random(seed)
    pool = " ".join(LINES).split()
    return [" ".join(stream.choices(pool, k=stream.randrange(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("sample", [LINES, LINES[:2], texts(0), texts(1), texts(2, 40)], ids=range(5))
def test_self_bleu_is_sacrebleus(sample):
    bleu = pytest.importorskip("sacrebleu").BLEU(smooth_method="exp", effective_order=True)
    each = [bleu.sentence_score(t, [*sample[:i], *sample[i + 1 :]]).score for i, t in enumerate(sample)]
    assert self_bleu(sample) == pytest.approx(sum(each) / len(each), abs=1e-9)


@pytest.mark.parametrize("line", [*LINES, "a.b,c 1.2,3 a-1 1-a", "tab\tand\nline-\nbreak", "é{}|~[]^_`@:;<=>?/!#$%*+"])
def test_tokens_are_mtevals(line):
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    assert tokens_13a(line) == tokenizer(line.rstrip()).split()


def test_self_bleu_of_few_texts():
    assert self_bleu([]) is None
    assert self_bleu(["alone"]) is None
    assert self_bleu(["same words here now", "same words here now"]) == pytest.approx(100.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0


def test_mean_cosine_is_the_mean_over_pairs():
    stream = random.Random(3)
    rows = [[stream.gauss(0, 1) for _ in range(5)] for _ in range(9)]

    def cosine(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)

    pairs = [cosine(u, v) for i, u in enumerate(rows) for j, v in enumerate(rows) if i != j]
    assert mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs))
    assert mean_cosine([[1.0, 0.0], [0.0, 2.0]]) == pytest.approx(0.0)
    assert mean_cosine([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]) == pytest.approx(1 / 3)
    assert mean_cosine(rows[:1]) is None


def test_overlap_of_equal_and_unrelated_texts():
    assert self_overlap([words("a b c d e")] * 2) == pytest.approx(1.0)
    assert self_overlap([words("a b c d"), words("e f g h")]) < 0.3
