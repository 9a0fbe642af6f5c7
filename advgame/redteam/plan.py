"""A campaign as the command line asks for it: checked before anything loads, then seated."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from advgame.errors import InputError
from advgame.evals.classify import Classifier, PhraseClassifier, WorldClassifier
from advgame.game.judge import Judge
from advgame.game.llm_judge import LLMJudge
from advgame.game.phrase_judge import PhraseJudge
from advgame.game.prompts import Templates
from advgame.game.tree import Seed
from advgame.redteam.budget import Budget
from advgame.redteam.campaign import STRATEGIES, Campaign
from advgame.redteam.goals import Goals, world_goals
from advgame.redteam.judges import AttackJudge, GameJudge, LedgerSpeaker, ModelJudge
from advgame.redteam.records import Ledger, Voice
from advgame.redteam.specs import Models, Spec, parse_spec
from advgame.redteam.strategies import Crew, SearchSettings, pair_settings, tap_settings
from advgame.redteam.writers import AttackWriter, GameWriter, JsonWriter
from advgame.rollout.engine import Sampling
from advgame.run.session import load_templates
from advgame.world.grammar import parse_prompt
from advgame.world.world import World

PRESETS: Mapping[str, Mapping[str, int]] = {
    "code": {"streams": 3, "turns": 3, "keep_last": 4},
    "harmbench": {"streams": 20, "turns": 3, "keep_last": 3},
    "jailbreakbench": {"streams": 30, "turns": 3, "keep_last": 4},
}
"""PAIR's published defaults; TAP's are the same everywhere."""

SAMPLING: Mapping[str, Sampling] = {
    "attacker": Sampling(1.0, 0.9, 500),
    "target": Sampling(0.0, 1.0, 150),
    "judge": Sampling(0.0, 1.0, 10),
    "faithful": Sampling(0.0, 1.0, 1024),
    "classifier": Sampling(0.0, 1.0, 128),
}


@dataclass(frozen=True)
class Plan:
    """Who attacks whom and how. `judge` and `classifier` are "rule", "phrases" or a model; `driver` runs PAIR's or
    TAP's conversations where that is not the attacker.
    """

    strategy: str
    attacker: Spec
    target: Spec
    judge: str | Spec
    classifier: str | Spec
    k: int
    search: SearchSettings | None
    driver: Spec | None = None
    writer: str = "auto"
    seed_queries: int | None = None
    classify_all: bool = False
    in_flight: int = 32
    run_seed: int = 0
    sampling: Mapping[str, Sampling] = field(default_factory=dict)

    @property
    def world(self) -> World | None:
        return self.target.world or self.attacker.world

    @property
    def specs(self) -> list[Spec]:
        named = (self.attacker, self.driver, self.target, self.judge, self.classifier)
        return [spec for spec in named if isinstance(spec, Spec)]

    def settings(self, seeds: Sequence[Seed]) -> dict[str, Any]:
        """What decides the answers: a folder is only continued with the same. May make the world's players."""

        def who(one: str | Spec | None) -> str | None:
            return one.identity() if isinstance(one, Spec) else one

        texts = json.dumps([[seed.id, seed.text] for seed in seeds])
        return {
            "strategy": self.strategy,
            "attacker": who(self.attacker),
            "driver": who(self.driver),
            "target": who(self.target),
            "judge": who(self.judge),
            "classifier": who(self.classifier),
            "writer": self.writer,
            "k": self.k if self.search is None else None,
            "search": None if self.search is None else asdict(self.search),
            "sampling": {role: asdict(self.how(role)) for role in SAMPLING},
            "queries_per_seed": self.seed_queries,
            "classify": "all" if self.classify_all else "best",
            "seed": self.run_seed,
            "seeds": f"{len(seeds)} {hashlib.blake2b(texts.encode(), digest_size=8).hexdigest()}",
        }

    def how(self, role: str) -> Sampling:
        """How a role samples: as asked for, as the attacker was trained, or by the methods' defaults."""
        if role in self.sampling:
            return self.sampling[role]
        if role == "attacker" and self.attacker.config is not None:
            trained = self.attacker.config.attacker.sampling
            return Sampling(trained.temperature, trained.top_p, trained.max_tokens)
        return SAMPLING[role]

    def plays(self, spec: Spec) -> bool:
        """Whether a model attacks in the game's format (a run's player) rather than in PAIR's JSON chat."""
        return spec.config is not None if self.writer == "auto" else self.writer == "game"


def make_plan(
    *,
    strategy: str,
    attacker: str,
    target: str,
    judge: str | None,
    classifier: str | None,
    preset: str,
    k: int = 8,
    driver: str | None = None,
    search: Mapping[str, int] | None = None,
    **options: Any,
) -> Plan:
    """Names to a checked plan; `search` overrides single fields of the preset. Raises InputError."""
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy: unknown {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if driver is not None and not strategy.startswith("attacker+"):
        raise InputError(f"--driver: {strategy} has one attacker; use it with attacker+pair or attacker+tap")
    who = parse_spec(attacker, "--attacker", "attacker")
    whom = parse_spec(target, "--target", "target")
    drives = None if driver is None else parse_spec(driver, "--driver", "attacker")
    world = whom.world or who.world
    plan = Plan(
        strategy,
        who,
        whom,
        _reader(judge, "--judge", world),
        _reader(classifier, "--classifier", world),
        k,
        _search(strategy, preset, search or {}),
        drives,
        **options,
    )
    for spec in (plan.attacker, plan.judge):
        talks = isinstance(spec, Spec) and spec.endpoint is not None
        if talks and isinstance(spec, Spec) and spec.endpoint is not None and spec.endpoint.api == "completions":
            raise InputError(f"{spec.field}: api=completions has no turns to talk in; only a target can be asked so")
    return plan


def check_seeds(plan: Plan, seeds: Sequence[Seed]) -> None:
    """InputError if the exact judge or classifier is to read seeds that are not the tiny world's."""
    if "rule" in (plan.judge, plan.classifier):
        for seed in seeds:
            if parse_prompt(seed.text) is None:
                raise InputError(
                    f"--seeds: {seed.id} is not in the tiny world's language, which is all that the rule judge reads; "
                    "name a model with --judge and --classifier"
                )


def goals_of_world(plan: Plan, limit: int | None) -> Goals:
    """The tiny world's seeds; InputError if nobody comes from there."""
    if plan.world is None:
        raise InputError("--seeds: `world` names the tiny world's seeds, and neither attacker nor target is of it")
    return world_goals(plan.world, limit)


def _reader(text: str | None, field: str, world: World | None) -> str | Spec:
    if text is None:
        if world is None:
            raise InputError(f"{field}: name a model (folder or URL), or phrases for a smoke test")
        return "rule"
    if text == "rule" and world is None:
        raise InputError(f"{field}: rule reads the tiny world only, and neither attacker nor target was trained there")
    if text in ("rule", "phrases"):
        return text
    return parse_spec(text, field, "judge")


def _search(strategy: str, preset: str, given: Mapping[str, int]) -> SearchSettings | None:
    if preset not in PRESETS:
        raise InputError(f"--preset: unknown {preset!r}; choose one of {', '.join(PRESETS)}")
    for name, value in given.items():
        if value < (0 if name == "retries" else 1):
            raise InputError(f"--{name.replace('_', '-')}: {value} is too few")
    kind = strategy.removeprefix("attacker+")
    known = {
        "attacker": set[str](),
        "pair": {"streams", "turns", "keep_last", "retries"},
        "tap": {"depth", "branching", "width", "roots", "keep_last", "retries"},
    }
    for name in given:
        if name not in known[kind]:
            raise InputError(f"--{name.replace('_', '-')}: does not go with --strategy {strategy}")
    if kind == "pair":
        return pair_settings(**{**PRESETS[preset], **given})
    return tap_settings(**given) if kind == "tap" else None


async def seat(
    plan: Plan, name: str, ledger: Ledger, models: Models, counters: Counter[str], on_query: Callable[[], None]
) -> Campaign:
    """Opens the plan's models and seats everybody. `name` begins the keys of the ledger."""
    attacker = await models.open(plan.attacker, "attacker")
    driver = attacker if plan.driver is None else await models.open(plan.driver, "driver")
    target = Voice("target", await models.open(plan.target, "target"), plan.how("target"), target=True)
    voice = Voice("attacker", attacker, plan.how("attacker"))

    def writer_of(spec: Spec, voice: Voice, game: bool) -> AttackWriter:
        if game:
            return GameWriter(ledger, voice, _templates(plan, spec), counters)
        return JsonWriter(ledger, voice, counters)

    rewriter = writer_of(plan.attacker, voice, True) if plan.strategy.startswith("attacker") else None
    if plan.search is None:
        assert rewriter is not None, "best of k is the attacker's own strategy"
        writer = rewriter
    else:
        drives = plan.driver or plan.attacker
        how = plan.how("attacker") if plan.driver is None else _driver_sampling(plan)
        role = "attacker" if plan.driver is None else "driver"
        writer = writer_of(drives, Voice(role, driver, how), plan.plays(drives))
    crew = Crew(
        name,
        ledger,
        writer,
        target,
        await _judge(plan, ledger, models, counters),
        plan.seed_queries,
        rewriter,
        on_query,
    )
    classifier = await _classifier(plan, ledger, models, counters)
    return Campaign(crew, classifier, plan.strategy, plan.k, plan.search, plan.classify_all, plan.in_flight)


def _driver_sampling(plan: Plan) -> Sampling:
    if "driver" in plan.sampling:
        return plan.sampling["driver"]
    config = None if plan.driver is None else plan.driver.config
    if config is None:
        return SAMPLING["attacker"]
    trained = config.attacker.sampling
    return Sampling(trained.temperature, trained.top_p, trained.max_tokens)


def _templates(plan: Plan, spec: Spec) -> Templates:
    """The Attacker's instructions as it was trained with them; the package's own for a bare model."""
    if spec.config is None:
        return Templates.load()
    world = spec.world
    return load_templates(spec.config, None if world is None else world.templates_dir)


async def _judge(plan: Plan, ledger: Ledger, models: Models, counters: Counter[str]) -> AttackJudge:
    if isinstance(plan.judge, str):
        return GameJudge(_game_judge(plan), counters)
    model = await models.open(plan.judge, "judge")
    voice = Voice("judge", model, plan.how("judge"))
    speaker = LedgerSpeaker(ledger, Voice("faithful", model, plan.how("faithful")), counters)
    game = LLMJudge(speaker, Templates.load())
    return ModelJudge(ledger, voice, Voice("topic", model, plan.how("judge")), game, counters)


def _game_judge(plan: Plan) -> Judge:
    if plan.judge == "phrases":
        return PhraseJudge()
    assert plan.world is not None, "checked with the plan"
    return plan.world.judge()


async def _classifier(plan: Plan, ledger: Ledger, models: Models, counters: Counter[str]) -> Classifier:
    if plan.classifier == "phrases":
        return PhraseClassifier()
    if plan.classifier == "rule":
        return WorldClassifier()
    raise InputError("--classifier: only rule and phrases so far")


def make_budget(max_queries: int | None, max_tokens: int | None) -> Budget:
    for name, value in (("max-queries", max_queries), ("max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise InputError(f"--{name}: {value} is too few; leave it out for no limit")
    return Budget(max_queries, max_tokens)
