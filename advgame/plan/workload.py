"""What one step asks of every role: requests, tokens in, tokens out; drawn from stated length distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from advgame.config import Config
from advgame.plan.assumptions import Assumptions

ROLES = ("attacker", "defender", "judge")


@dataclass(frozen=True)
class Request:
    """One completion: `cached` of its `prompt` tokens are already in the engine's prefix cache."""

    role: str
    prompt: int
    tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Lengths:
    """Log-normal completion lengths in tokens, cut at `longest`."""

    median: float
    sigma: float
    longest: int

    def draw(self, source: random.Random) -> int:
        return max(1, min(self.longest, round(self.median * math.exp(self.sigma * source.gauss(0, 1)))))

    @property
    def mean(self) -> float:
        """Of the uncut distribution, at most `longest`; the cut tail weighs little at the usual settings."""
        return min(float(self.longest), self.median * math.exp(self.sigma**2 / 2))


@dataclass(frozen=True)
class Workload:
    """The game's shape and its lengths; `draw_tree` is the walk of one seed as requests."""

    trees: int
    attacks: int
    responses: int
    attack: Lengths
    response: Lengths
    verdict: Lengths
    judge_calls: int  # for each question: samples, twice when both orders are asked
    pairwise: bool
    faithfulness: bool
    attacker_judge: bool
    skip_attacker: bool
    assumed: Assumptions

    @classmethod
    def of(cls, config: Config, assumed: Assumptions, trees: int | None = None) -> Workload:
        """The workload of a config; a rule or phrase judge asks no model."""
        sigma = assumed.sigma.value
        judge = config.judge
        calls = judge.samples * (2 if judge.swap and judge.mode == "pairwise" else 1) if judge.kind == "llm" else 0

        def lengths(median: float, longest: int) -> Lengths:
            return Lengths(min(median, longest), sigma, longest)

        return cls(
            trees or config.data.harmful + config.data.benign, config.game.attacks, config.game.responses,
            lengths(assumed.attack_tokens.value, config.attacker.sampling.max_tokens),
            lengths(assumed.response_tokens.value, config.defender.sampling.max_tokens),
            lengths(assumed.judge_tokens.value, judge.sampling.max_tokens),
            calls, judge.mode == "pairwise", config.game.faithfulness,
            config.game.attacker_judge and not config.game.self_play, config.game.skip_attacker, assumed,
        )  # fmt: skip

    @property
    def requests_per_tree(self) -> float:
        """When every attack is valid; 11 at A = D = 2 with a pairwise judge asked once."""
        attacks = 1 if self.skip_attacker else self.attacks
        own = 0 if self.skip_attacker else self.attacks
        faithful = 0 if self.skip_attacker or not self.faithfulness else self.attacks * min(self.judge_calls, 1)
        judged = attacks * self._questions(self.responses) * self.judge_calls
        above = self._questions(attacks) * self.judge_calls if self.attacker_judge and not self.skip_attacker else 0
        return own + faithful + attacks * self.responses + judged + above

    def _questions(self, candidates: int) -> int:
        if not self.pairwise:
            return candidates
        return max(1, math.comb(candidates, 2))

    def _verdicts(self, lengths: list[int], query: int, source: random.Random) -> list[Request]:
        a = self.assumed
        rubric = round(a.rubric_tokens.value)
        if self.pairwise:
            couples = list(combinations(lengths, 2)) or [(n, n) for n in lengths]
        else:
            couples = [(n, 0) for n in lengths]
        return [
            Request("judge", rubric + query + one + other, self.verdict.draw(source), rubric)
            for one, other in couples
            for _ in range(self.judge_calls)
        ]

    def draw_tree(self, source: random.Random) -> TreeDraw:
        """A tree's requests with all their lengths fixed now, so that layouts are compared on the same trees."""
        a = self.assumed
        seed = round(a.seed_tokens.value)
        branches = []
        for _ in range(1 if self.skip_attacker else self.attacks):
            attack = faithful = None
            prompt = seed
            valid = True
            if not self.skip_attacker:
                tokens = self.attack.draw(source)
                instruction = round(a.instruction_tokens.value)
                attack = Request("attacker", instruction + seed, tokens, instruction)
                prompt = max(1, round(tokens * a.prompt_share.value))
                valid = source.random() < a.valid_share.value
                if self.faithfulness and self.judge_calls:
                    rubric = round(a.rubric_tokens.value)
                    faithful = Request("judge", rubric + seed + prompt, self.verdict.draw(source), rubric)
            answers = [Request("defender", prompt, self.response.draw(source)) for _ in range(self.responses)]
            verdicts = self._verdicts([r.tokens for r in answers], prompt, source)
            branches.append(Branch(attack, faithful, tuple(answers) if valid else (), tuple(verdicts) if valid else ()))
        final: list[Request] = []
        shown = [branch.answers[0].tokens for branch in branches if branch.answers]
        if self.attacker_judge and not self.skip_attacker and shown:
            final = self._verdicts(shown, seed, source)
        return TreeDraw(tuple(branches), tuple(final))

    def draw(self, seed: int = 0) -> list[TreeDraw]:
        source = random.Random(seed)
        return [self.draw_tree(source) for _ in range(self.trees)]


@dataclass(frozen=True)
class Branch:
    """One attack and what follows from it, each stage after the one before."""

    attack: Request | None
    faithful: Request | None
    answers: tuple[Request, ...]
    verdicts: tuple[Request, ...]

    def stages(self) -> Iterator[tuple[Request, ...]]:
        for one in (self.attack, self.faithful):
            if one is not None:
                yield (one,)
        if self.answers:
            yield self.answers
        if self.verdicts:
            yield self.verdicts


@dataclass(frozen=True)
class TreeDraw:
    """Branches side by side, then the Attacker judge's questions."""

    branches: tuple[Branch, ...]
    final: tuple[Request, ...]

    def requests(self) -> Iterator[Request]:
        for branch in self.branches:
            for stage in branch.stages():
                yield from stage
        yield from self.final
