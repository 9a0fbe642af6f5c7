"""Continuous verification of what engines serve: their log-probs of fresh samples against the average's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from advgame.game.pairs import Role
from advgame.game.tree import Sample, Tree
from advgame.learn.trainer import SamplerGap
from advgame.rollout.replicas import Served
from advgame.run.session import Session, Side

LIMITS = {"float32": 0.02, "bfloat16": 1.0}
"""Nats that 64 tokens may differ by in the mean: measured are 0.00004 in float32 and 0.16 in bfloat16, without bias; an
engine that missed one publish at a learning rate that does anything is off by nats."""


def measure_gaps(session: Session, trees: Sequence[Tree], step: int) -> dict[str, SamplerGap]:
    """By player, every `verify_every` steps and before the weights that sampled change; none where the update measures
    it anyway.

    trees: sampled from the weights of this step, or they do not count. With `run.ahead` these are the next step's,
    there when this step has learned; a live player has changed by then, and nothing can be measured.
    """
    found = {}
    for side in session.sides:
        if session.config.run.ahead and side.learner is not None and not side.learner.averaged:
            continue
        if due(session, side, step) and not measured_by_update(side) and (samples := samples_of(side, trees, step)):
            assert side.learner is not None
            found[side.name] = side.learner.sampler_gap(samples)
    return found


def gap_metrics(
    session: Session,
    trees: Sequence[Tree],
    step: int,
    gaps: Mapping[str, SamplerGap],
    learned: Mapping[str, float],
    warn: Callable[[str], None],
) -> dict[str, float]:
    """`sampler_gap_<player>` and `sampler_gap_max_<player>`, nats a sequence; beyond the limit it is counted and told.

    `learned`: the step's metrics, which hold the gap of an update that recomputed its reference.
    """
    values: dict[str, float] = {}
    for side in session.sides:
        gap = gaps.get(side.name)
        recomputed = learned.get(f"learn/{side.name}/reference_gap")
        if gap is None and recomputed is not None and due(session, side, step):
            samples = samples_of(side, trees)  # of whichever version: the update refers to the one that sampled
            tokens = sum(len(s.token_ids) for s in samples) / max(1, len(samples))
            gap = SamplerGap(recomputed, learned[f"learn/{side.name}/reference_gap_max"], tokens)
        if gap is None:
            continue
        values |= {f"sampler_gap_{side.name}": gap.mean, f"sampler_gap_max_{side.name}": gap.largest}
        if gap.mean > (most := limit(session, gap.tokens)):
            session.counters[f"{side.name}_sampler_gaps"] += 1
            warn(
                f"step {step}: the {side.name}'s sampler is {gap.mean:.3g} nats a sequence from the weights it should "
                f"serve (limit {most:.3g} at {gap.tokens:.0f} tokens); its samples cannot stand for the reference"
            )
    return values


def due(session: Session, side: Side, step: int) -> bool:
    every = session.config.rollout.vllm.verify_every
    return side.learner is not None and isinstance(side.engine, Served) and bool(every) and step % every == 0


def measured_by_update(side: Side) -> bool:
    """Whether this player's updates compare the sampler with the average themselves."""
    learner = side.learner
    assert learner is not None
    pairs = learner.settings.objective in ("dpo", "ipo")
    return pairs and learner.reference.decided in (None, "recompute")


def samples_of(side: Side, trees: Sequence[Tree], version: int | None = None) -> list[Sample]:
    """What this player sampled, with the weights of `version` or (None) any."""
    made: list[Sample | None] = []
    for tree in trees:
        if Role.ATTACKER in side.roles:
            made += [attack.sample for attack in tree.attacks]
        if Role.DEFENDER in side.roles:
            made += [response.sample for attack in tree.attacks for response in attack.responses]
    return [s for s in made if s is not None and s.token_ids and version in (None, s.version)]


def limit(session: Session, tokens: float) -> float:
    """Rounding adds up like a random walk: with the root of the length beyond 64 tokens."""
    config = session.config
    narrow = "bfloat16" in (config.rollout.dtype, config.learn.dtype)
    most = config.rollout.vllm.sampler_gap or LIMITS["bfloat16" if narrow else "float32"]
    return most * math.sqrt(max(1.0, tokens / 64))
