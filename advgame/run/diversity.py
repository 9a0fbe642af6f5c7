"""Diversity of a set of texts: distinct-n, self-BLEU and a cheaper overlap like it, and the spread of vectors."""

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
_13A = tuple(
    (re.compile(pattern), spaced)
    for pattern, spaced in (
        (r"([!-&(-+/:-@[-`{-~])", r" \1 "),  # ASCII punctuation, but for ' , - .
        (r"([^0-9])([.,])", r"\1 \2 "),
        (r"([.,])([^0-9])", r" \1 \2"),
        (r"([0-9])(-)", r"\1 \2 "),
    )
)


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
    text are left out. Cost is linear in the number of words.
    """
    if len(texts) < 2:
        return None
    logs: list[list[float]] = [[] for _ in texts]
    for n in range(1, max_n + 1):
        for (matched, total), log in zip(_matches(texts, n), logs, strict=True):
            if total:
                log.append(math.log(max(matched, 0.5) / total))
    scores = [math.exp(sum(log) / len(log)) for log in logs if log]
    return sum(scores) / len(scores) if scores else None


def self_bleu(texts: Sequence[str], max_n: int = 4) -> float | None:
    """Self-BLEU (Zhu et al. 2018), 0 to 100, higher is more alike; None below two texts.

    The mean over texts of each one's sentence BLEU against all the others, with sacrebleu's conventions: 13a
    tokenisation, exponential smoothing, effective order, closest reference length (sacrebleu is what the tests compare
    it with). Cost is linear in the number of words.
    """
    if len(texts) < 2:
        return None
    tokens = [tuple(tokens_13a(text)) for text in texts]
    counts = [_matches(tokens, n) for n in range(1, max_n + 1)]
    lengths = Counter(map(len, tokens))
    scores = []
    for i, text in enumerate(tokens):
        others = lengths - Counter([len(text)])
        closest = min(others, key=lambda other: (abs(other - len(text)), other))
        scores.append(_bleu([order[i] for order in counts], len(text), closest))
    return sum(scores) / len(scores)


def tokens_13a(text: str) -> list[str]:
    """The tokens of WMT's mteval-v13a script, case kept."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = f" {text} "
    for pattern, spaced in _13A:
        text = pattern.sub(spaced, text)
    return text.split()


def mean_cosine(vectors: Sequence[Sequence[float]]) -> float | None:
    """The mean cosine of all pairs of different vectors (rows, size), -1 to 1; None below two. Zero vectors count 0.

    By the identity sum over i, j of u_i . u_j = |sum of u|^2, so it is linear in the number of vectors.
    """
    if len(vectors) < 2:
        return None
    total = [0.0] * len(vectors[0])
    own = 0.0
    for vector in vectors:
        norm = math.sqrt(sum(x * x for x in vector))
        if norm:
            own += 1.0
            total = [t + x / norm for t, x in zip(total, vector, strict=True)]
    count = len(vectors)
    return (sum(t * t for t in total) - own) / (count * (count - 1))


def _bleu(orders: Sequence[tuple[int, int]], length: int, reference: int) -> float:
    """Sentence BLEU of (matched, total) by order; each order without a match gets half of what the last one got."""
    if not any(matched for matched, _ in orders):
        return 0.0
    smoothing, logs = 1.0, []
    for matched, total in orders:
        if not total:
            break
        if not matched:
            smoothing *= 2
        logs.append(math.log(100.0 * matched / total if matched else 100.0 / (smoothing * total)))
    brevity = math.exp(1 - reference / length) if length < reference else 1.0
    return brevity * math.exp(sum(logs) / len(logs))


def _matches(texts: Sequence[Words], n: int) -> list[tuple[int, int]]:
    """By text: how many of its n-grams occur in some other text, each at most as often as there, and how many it has.

    A text's best count among the others is the best or the second best of all.
    """
    counts = [Counter(ngrams(text, n)) for text in texts]
    best: dict[Words, tuple[int, int]] = {}  # n-gram -> (highest count, second highest) over texts
    for count in counts:
        for gram, k in count.items():
            first, second = best.get(gram, (0, 0))
            best[gram] = (k, first) if k > first else (first, max(second, k))

    def matched(count: Counter[Words]) -> int:
        return sum(min(k, best[gram][0] if k < best[gram][0] else best[gram][1]) for gram, k in count.items())

    return [(matched(count), count.total()) for count in counts]


def ngrams(text: Words, n: int) -> list[Words]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]
