"""Micro-batches by tokens: pairs whole, those of one prompt together, all about equally large.

The setting `learn.micro_tokens` bounds what one forward and backward keeps in memory. The loss is normalised over
the whole batch beforehand, so how it is split changes no gradient beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from advgame.game.pairs import Member, Pair
from advgame.game.tree import Sample
from advgame.learn.packing import input_length

Unit = TypeVar("Unit")

_SHORT = Sample((0,), (0, 0), (0.0, 0.0), "stop", 0)
FILLER_PAIR = Pair(_SHORT, _SHORT, 0.0, 0.0, "")
FILLER_MEMBER = Member(_SHORT, 0.0, 0.0, 0.0)
"""What a rank computes, at no weight, while others still have micro-batches."""


@dataclass
class _Piece:
    """Units that stay together, by index, and the tokens that they take."""

    units: list[int]
    tokens: int


def packed_tokens(samples: Iterable[Sample], share: bool) -> int:
    """Tokens of one packed batch of `samples`."""
    if not share:
        return sum(input_length(s) for s in samples)
    prompts = set()
    total = 0
    for s in samples:
        total += len(s.token_ids) - 1 + (0 if s.prompt_ids in prompts else len(s.prompt_ids))
        prompts.add(s.prompt_ids)
    return total


def micro_batches(
    units: Iterable[tuple[Unit, Sequence[Sample]]], limit: int, *, share: bool = False
) -> list[list[Unit]]:
    """Splits units (a pair, a group member) into batches of at most `limit` tokens; a larger unit stands alone.

    Best fit, longest first, and then evened out when the same number of batches allows it. With `share`, units of
    one prompt stay together as far as they fit. Order within a batch and among batches follows the input.
    """
    given = list(units)
    pieces = _pieces([samples for _, samples in given], limit, share)
    pieces.sort(key=lambda piece: (-piece.tokens, piece.units[0]))
    fitted = _best_fit(pieces, limit)
    even = _even(pieces, len(fitted))
    chosen = even if max(map(_load, even), default=0) < max(map(_load, fitted), default=0) else fitted
    batches = sorted(sorted(i for piece in batch for i in piece.units) for batch in chosen)
    return [[given[i][0] for i in batch] for batch in batches]


def shares(
    units: Sequence[tuple[Unit, Sequence[Sample]]], ranks: int, limit: int, *, share: bool = False
) -> list[list[tuple[Unit, Sequence[Sample]]]]:
    """The units that each of `ranks` ranks computes: about equally many tokens each, some none where there are too few.

    With `share`, units of one prompt stay together unless a rank would have to wait for them. Order follows the input.
    """
    if ranks == 1:
        return [list(units)]
    samples = [own for _, own in units]
    tokens = packed_tokens([s for own in samples for s in own], share)
    pieces = _pieces(samples, min(limit, -(-tokens // ranks)), share)
    pieces.sort(key=lambda piece: (-piece.tokens, piece.units[0]))
    return [[units[i] for i in sorted(i for piece in batch for i in piece.units)] for batch in _even(pieces, ranks)]


def _pieces(units: Sequence[Sequence[Sample]], limit: int, share: bool) -> list[_Piece]:
    families: dict[object, list[int]] = {}
    for i, samples in enumerate(units):
        families.setdefault(samples[0].prompt_ids if share else i, []).append(i)
    pieces = []
    for members in families.values():
        piece: list[int] = []
        for i in members:
            if piece and packed_tokens([s for j in (*piece, i) for s in units[j]], share) > limit:
                pieces.append(piece)
                piece = []
            piece.append(i)
        pieces.append(piece)
    return [_Piece(piece, packed_tokens([s for i in piece for s in units[i]], share)) for piece in pieces]


def _load(batch: Sequence[_Piece]) -> int:
    return sum(piece.tokens for piece in batch)


def _best_fit(pieces: Sequence[_Piece], limit: int) -> list[list[_Piece]]:
    """Each piece goes where it leaves the least room; `pieces` come longest first."""
    batches: list[list[_Piece]] = []
    for piece in pieces:
        fitting = [batch for batch in batches if _load(batch) + piece.tokens <= limit]
        if fitting:
            max(fitting, key=_load).append(piece)
        else:
            batches.append([piece])
    return batches


def _even(pieces: Sequence[_Piece], count: int) -> list[list[_Piece]]:
    """Each piece goes to the smallest of `count` batches; `pieces` come longest first."""
    batches: list[list[_Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        min(batches, key=_load).append(piece)
    return batches
