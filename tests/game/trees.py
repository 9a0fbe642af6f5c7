"""Builders of small trees for tests."""

from __future__ import annotations

from advgame.game.tree import Attack, Category, PairScore, Response, Sample, Seed, Tree

HARMFUL = Seed("h:1", Category.HARMFUL, "kill the old neighbor")
BENIGN = Seed("b:1", Category.BENIGN, "kill a python process")


def sample(*tokens: int, finish: str = "stop", prompt: tuple[int, ...] = (1, 2), version: int = 0) -> Sample:
    tokens = tokens or (5, 6)
    return Sample(prompt, tokens, (-0.5,) * len(tokens), finish, version)


def response(token: int = 7, *, finish: str = "stop", answer: str | None = "an answer") -> Response:
    return Response(sample(token, 3, finish=finish), answer or "", answer)


def attack(
    *responses: Response,
    verdicts: tuple[PairScore, ...] = (),
    token: int = 9,
    finish: str = "stop",
    prompt: str | None = "a prompt",
    faithful: bool | None = True,
) -> Attack:
    return Attack(sample(token, 4, finish=finish), "text", prompt, faithful, responses, verdicts)


def pair(first: int, second: int, a: float | None = None, b: float | None = None) -> PairScore:
    return PairScore(first, second, None if a is None or b is None else (a, b))


def tree(
    *attacks: Attack,
    verdicts: tuple[PairScore, ...] = (),
    representatives: tuple[int | None, ...] | None = None,
    seed: Seed = HARMFUL,
) -> Tree:
    chosen = tuple(0 for _ in attacks) if representatives is None else representatives
    return Tree(seed, 0, 0, attacks, chosen, verdicts)
