"""A campaign as the command line asks for it, checked before anything loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from advgame.errors import InputError
from advgame.evals.formats import FORMATS
from advgame.evals.named import ModelSpec, parse_model
from advgame.game.tree import Seed
from advgame.redteam.budget import Budget
from advgame.redteam.campaign import STRATEGIES
from advgame.redteam.goals import Goals, world_goals
from advgame.redteam.strategies import SearchSettings, pair_settings, tap_settings
from advgame.rollout.engine import Sampling
from advgame.world.grammar import parse_prompt
from advgame.world.world import World

KINDS = tuple(name for name, form in FORMATS.items() if "harmful" in form.tells)
"""Formats of classifiers that say whether an answer is harmful."""

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
}


@dataclass(frozen=True)
class Plan:
    """Who attacks whom and how. `judge` is "rule", "phrases" or a model; `classifier` "world", "phrases" or a model
    that is asked in the format `classifier_kind`; `driver` runs PAIR's or TAP's conversations where that is not the
    attacker.
    """

    strategy: str
    attacker: ModelSpec
    target: ModelSpec
    judge: str | ModelSpec
    classifier: str | ModelSpec
    k: int
    search: SearchSettings | None
    driver: ModelSpec | None = None
    classifier_kind: str = ""
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
    def specs(self) -> list[ModelSpec]:
        named = (self.attacker, self.driver, self.target, self.judge, self.classifier)
        return [spec for spec in named if isinstance(spec, ModelSpec)]

    def settings(self, seeds: Sequence[Seed]) -> dict[str, Any]:
        """What decides the answers: a folder is only continued with the same. May make the world's players."""

        def who(one: str | ModelSpec | None) -> str | None:
            return one.identity() if isinstance(one, ModelSpec) else one

        texts = json.dumps([[seed.id, seed.text] for seed in seeds])
        return {
            "strategy": self.strategy,
            "attacker": who(self.attacker),
            "driver": who(self.driver),
            "target": who(self.target),
            "judge": who(self.judge),
            "classifier": f"{self.classifier_kind}@{who(self.classifier)}",
            "writer": self.writer,
            "k": self.k if self.search is None else None,
            "search": None if self.search is None else asdict(self.search),
            "sampling": {role: asdict(how) for role, how in self._samplings().items()},
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

    def _samplings(self) -> dict[str, Sampling]:
        return {**{role: self.how(role) for role in SAMPLING}, **self.sampling}

    def plays(self, spec: ModelSpec) -> bool:
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
    who = parse_model(attacker, "--attacker", "attacker")
    whom = parse_model(target, "--target", "target")
    drives = None if driver is None else parse_model(driver, "--driver", "attacker")
    world = whom.world or who.world
    named, kind = _classifier_named(classifier, world)
    plan = Plan(
        strategy,
        who,
        whom,
        _judge_named(judge, world),
        named,
        k,
        _search(strategy, preset, search or {}),
        drives,
        kind,
        **options,
    )
    _check_clip(plan)
    for spec in (plan.attacker, plan.judge):
        talks = isinstance(spec, ModelSpec) and spec.endpoint is not None
        if talks and isinstance(spec, ModelSpec) and spec.endpoint is not None and spec.endpoint.api == "completions":
            raise InputError(f"{spec.field}: api=completions has no turns to talk in; only a target can be asked so")
    return plan


def check_seeds(plan: Plan, seeds: Sequence[Seed]) -> None:
    """InputError if the exact judge or classifier is to read seeds that are not the tiny world's."""
    if plan.judge == "rule" or plan.classifier == "world":
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


def _judge_named(text: str | None, world: World | None) -> str | ModelSpec:
    if text is None and world is None:
        raise InputError("--judge: name a model (folder or URL#NAME), or phrases for a smoke test")
    if text == "rule" and world is None:
        raise InputError("--judge: rule reads the tiny world only, and neither attacker nor target was trained there")
    if text in (None, "rule", "phrases"):
        return text or "rule"
    return parse_model(text, "--judge", "judge")


def _classifier_named(text: str | None, world: World | None) -> tuple[str | ModelSpec, str]:
    """What classifies, and in which format if it is a model."""
    kinds = ", ".join(KINDS)
    if text is None and world is None:
        raise InputError(f"--classifier: give KIND@MODEL (kinds: {kinds}), or phrases for a smoke test")
    if text == "world" and world is None:
        raise InputError("--classifier: world reads the tiny world only, and neither attacker nor target is of it")
    if text in (None, "world", "phrases"):
        return text or "world", ""
    kind, at, model = text.partition("@")
    if not at or kind not in KINDS:
        raise InputError(f"--classifier: {text!r} is not KIND@MODEL; kinds: {kinds}")
    return parse_model(model, "--classifier", "judge"), kind


def _check_clip(plan: Plan) -> None:
    clip = FORMATS[plan.classifier_kind].clip if plan.classifier_kind else None
    if clip is not None and plan.how("target").max_tokens > clip:
        raise InputError(
            f"--classifier: {plan.classifier_kind} reads {clip} tokens of an answer; the target may write more; give "
            f"--sampling target=0,1,{clip} or less"
        )


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


def make_budget(max_queries: int | None, max_tokens: int | None) -> Budget:
    for name, value in (("max-queries", max_queries), ("max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise InputError(f"--{name}: {value} is too few; leave it out for no limit")
    return Budget(max_queries, max_tokens)
