"""Lexical diversity of a set of texts: distinct-n and a self-BLEU-like overlap, both cheap."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

Words = tuple[str, ...]
T = TypeVar("T")

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> Words:
    """Lower-cased words and single punctuation marks."""
    return tuple(_WORD.findall(text.lower()))


def spread(items: Sequence[T], size: int) -> list[T]:
    """`size` items evenly spaced over `items` (all of them if there are no more); the same ones every time.

    Diversity measures depend on the number of texts, so steps are only comparable at one size.
    """
    if len(items) <= size:
        return list(items)
    return [items[i * len(items) // size] for i in range(size)]


def distinct_n(texts: Sequence[Words], n: int) -> float | None:
    """Different n-grams divided by all n-grams (Li et al. 2016), in (0, 1]; None without any n-gram."""
    grams = Counter(chain.from_iterable(ngrams(text, n) for text in texts))
    total = grams.total()
    return len(grams) / total if total else None


def self_overlap(texts: Sequence[Words], max_n: int = 4) -> float | None:
    """How much texts repeat each other: 1 if identical, near 0 if unrelated; None below two texts.

    Self-BLEU (Zhu et al. 2018) in small: per text, the geometric mean over n = 1..`max_n` of its n-gram
    precision clipped against the other texts, without brevity penalty; then the mean over texts. An n with no
    match counts half a match, so that one missing order does not make the mean zero; orders longer than the
    text are left out. Cost is linear in the number of words: a text's best count among the others is the best
    or the second best of all.
    """
    if len(texts) < 2:
        return None
    logs: list[list[float]] = [[] for _ in texts]
    for n in range(1, max_n + 1):
        counts = [Counter(ngrams(text, n)) for text in texts]
        best: dict[Words, tuple[int, int]] = {}  # n-gram -> (highest count, second highest) over texts
        for count in counts:
            for gram, k in count.items():
                first, second = best.get(gram, (0, 0))
                best[gram] = (k, first) if k > first else (first, max(second, k))
        for count, log in zip(counts, logs, strict=True):
            if total := count.total():
                matched = sum(min(k, best[g][0] if k < best[g][0] else best[g][1]) for g, k in count.items())
                log.append(math.log(max(matched, 0.5) / total))
    scores = [math.exp(sum(log) / len(log)) for log in logs if log]
    return sum(scores) / len(scores) if scores else None


def ngrams(text: Words, n: int) -> list[Words]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]
