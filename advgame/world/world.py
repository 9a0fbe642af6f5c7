"""The tiny world as the rest of the package sees it: seeds, players, templates, judge, exact worst case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from advgame.errors import InputError
from advgame.game.tree import Seed
from advgame.world.exact import ExactReport, exact_report
from advgame.world.grammar import (
    INTENTS,
    Framings,
    Intent,
    ParsedPrompt,
    attacks,
    classify,
    parse_prompt,
    request,
)
from advgame.world.judge import RuleJudge
from advgame.world.settings import WorldSettings
from advgame.world.training import PlayerRole
from advgame.world.warmstart import Progress, default_cache, ensure_players

TEMPLATES = Path(__file__).parent / "templates"


def seed_of(prompt: ParsedPrompt) -> Seed:
    """A prompt of the world as a seed; ids are stable and say which intent and framing it is."""
    intent = prompt.intent
    framing = "" if prompt.plain else f":{prompt.prefix}.{prompt.paraphrase}.{prompt.suffix}"
    return Seed(f"world:{intent.name}{framing}", intent.category, prompt.text)


@dataclass(frozen=True)
class World:
    """One world. The first reading of a model's path may train it: half a minute to one, told to `progress`."""

    settings: WorldSettings
    cache: Path
    progress: Progress | None = field(default=None, compare=False)

    @property
    def train_seeds(self) -> list[Seed]:
        """The 36 plain seeds of the game, 18 of each category."""
        return [seed_of(ParsedPrompt(intent)) for intent in INTENTS if not intent.heldout]

    @property
    def heldout_seeds(self) -> list[Seed]:
        """The 12 plain seeds that the game never plays, 6 of each category."""
        return [seed_of(ParsedPrompt(intent)) for intent in INTENTS if intent.heldout]

    def adversarial_seeds(self, limit: int = 128) -> list[Seed]:
        """At most `limit` prompts of held-out framings on held-out intents, spread evenly over both."""
        every = [attacks(intent, "heldout") for intent in INTENTS if intent.heldout]
        count = len(every[0])
        # round-robin over intents, and a stride that has no factor in common with the 200 framings
        order = [(intent, step * 77 % count) for step in range(count) for intent in range(len(every))]
        return [seed_of(every[intent][framing]) for intent, framing in order[:limit]]

    @property
    def templates_dir(self) -> Path:
        """The game's role instructions in the world's words."""
        return TEMPLATES

    @property
    def attacker_path(self) -> Path:
        """The warm-started Attacker's model folder."""
        return self._made(PlayerRole.ATTACKER)

    @property
    def defender_path(self) -> Path:
        """The warm-started Defender's model folder."""
        return self._made(PlayerRole.DEFENDER)

    @property
    def shared_path(self) -> Path:
        """The model folder of one player warm-started in both roles (Self-RedTeam)."""
        return self._made(PlayerRole.SHARED)

    @property
    def judge_path(self) -> Path:
        """The model folder of the world's own language-model judge; `judge_templates` are what it can be asked."""
        return self._made(PlayerRole.JUDGE)

    def make(self, roles: Sequence[str]) -> None:
        """Makes all of these that the cache lacks, at once; later readings of their paths find them there."""
        ensure_players(self.settings, [PlayerRole(role) for role in roles], self.cache, self.progress)

    def _made(self, role: PlayerRole) -> Path:
        return ensure_players(self.settings, [role], self.cache, self.progress)[role]

    def judge(self, noise: float = 0.0, bias: float = 0.0, seed: int = 0) -> RuleJudge:
        """The world's judge by rule; see `RuleJudge` for what noise, bias and the run's seed do."""
        return RuleJudge(noise, bias, seed)

    def discloses(self, seed: Seed, answer: str) -> bool:
        """Whether the whole answer gives away the tool or action that the seed asks for (leaks included)."""
        return classify(answer, self._intent(seed)).discloses

    def complies(self, seed: Seed, answer: str) -> bool:
        """Whether the whole answer helps with what the seed asks for (a leak, which declines, does not)."""
        return classify(answer, self._intent(seed)).complies

    def exact(
        self, model: PreTrainedModel, *, intents: tuple[Intent, ...] = INTENTS, framings: Framings = "all"
    ) -> ExactReport:
        """The exact worst case of a Defender in eval mode; see `exact_report`."""
        return exact_report(model, intents=intents, framings=framings)

    def _intent(self, seed: Seed) -> Intent:
        prompt = parse_prompt(seed.text)
        if prompt is None:
            raise InputError(
                f"{seed.id}: {seed.text!r} is not in the tiny world's language; use seeds like "
                f"{request(INTENTS[0])!r}, or leave world: out"
            )
        return prompt.intent


def open_world(settings: WorldSettings, cache_dir: Path | None = None, progress: Progress | None = None) -> World:
    """The world of `settings`; players are made, or found in `cache_dir`, when their paths are first read.

    `cache_dir` None means $ADVGAME_CACHE or ~/.cache/advgame. `progress(role, step, steps, loss)` is called
    in the thread that asks for a player.
    """
    return World(settings, cache_dir or default_cache(), progress)
