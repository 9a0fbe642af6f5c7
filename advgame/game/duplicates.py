"""Finds equal and nearly equal texts: normalised comparison, MinHash candidates, true Jaccard to confirm.

Deterministic, in plain Python. Two texts are near duplicates if the sets of their 5-character shingles, after
normalisation, have a Jaccard index of at least the threshold; MinHash (64 bins of one permutation, densified,
in 16 bands of 4) only proposes pairs, and at an index of 0.8 misses about one in five thousand.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from functools import lru_cache

SHINGLE = 5
BINS = 64
BAND = 4
THRESHOLD = 0.8

_EMPTY = 1 << 32


def normalise(text: str) -> str:
    """Compatibility forms, case, punctuation and white space evened out; what is left decides about equality.

    A text of punctuation alone keeps it, so that such texts are not all equal.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(char if char.isalnum() else " " for char in folded).split()
    return " ".join(words or folded.split())


def exact_groups(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first one that is equal after normalisation."""
    first: dict[str, int] = {}
    return [first.setdefault(normalise(text), index) for index, text in enumerate(texts)]


def near_groups(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """For each text the index of the first one of its group: near duplicates, and near duplicates of those.

    About 1.5 million characters a second. Texts that share a band without being duplicates are compared one
    by one, so a file filled from one long form takes longer.

    Raises:
        ValueError: a threshold outside 0 (excluded) to 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"a Jaccard threshold lies between 0 and 1, not at {threshold}")
    normal = [normalise(text) for text in texts]
    groups = exact_groups(texts)
    buckets: dict[tuple[int, ...], list[int]] = {}

    @lru_cache(maxsize=4096)
    def shingles(index: int) -> frozenset[int]:
        return _shingles(normal[index])

    def root(index: int) -> int:
        while groups[index] != index:
            groups[index] = groups[groups[index]]
            index = groups[index]
        return index

    for index in range(len(texts)):
        if groups[index] != index:
            continue
        own = shingles(index)
        seen: set[int] = set()
        for band, rows in enumerate(_bands(own)):
            bucket = buckets.setdefault((band, *rows), [])
            for other in bucket:
                # Once joined, the rest of that group has nothing to add; the earliest index stays the root.
                if other in seen or root(other) == root(index):
                    continue
                seen.add(other)
                if jaccard(own, shingles(other)) >= threshold:
                    low, high = sorted((root(other), root(index)))
                    groups[high] = low
            bucket.append(index)
    return [root(index) for index in range(len(texts))]


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Size of the intersection over that of the union; two empty sets are equal."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def _shingles(text: str) -> frozenset[int]:
    raw = text.encode("utf-32-le", "surrogatepass")
    last = max(len(text) - SHINGLE, 0)
    # A hash each, not the text: 32 bits collide too rarely to move a Jaccard index.
    return frozenset(zlib.crc32(raw[4 * i : 4 * (i + SHINGLE)]) for i in range(last + 1))


def _bands(shingles: frozenset[int]) -> list[tuple[int, ...]]:
    signature = [_EMPTY] * BINS
    for shingle in shingles:
        mixed = (shingle * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
        place, value = mixed & (BINS - 1), (mixed >> 6) & 0xFFFFFFFF
        if value < signature[place]:
            signature[place] = value
    filled = [place for place in range(BINS) if signature[place] != _EMPTY]
    if filled:
        # Short texts leave bins empty: each borrows from the next filled one, marked by the distance.
        dense = list(signature)
        for place in range(BINS):
            distance = 0
            while signature[(place + distance) % BINS] == _EMPTY:
                distance += 1
            dense[place] = signature[(place + distance) % BINS] + distance * 0x100000001
        signature = dense
    return [tuple(signature[i : i + BAND]) for i in range(0, BINS, BAND)]
