"""What the players learn from: preference pairs, or groups with advantages.

Both players' material has the same shape, so that everything after this file is one code path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from advgame.game.rewards import FAILED, TreeRewards
from advgame.game.tree import Sample, Tree


class Role(StrEnum):
    ATTACKER = "attacker"
    DEFENDER = "defender"


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected completion of one prompt; `seed_id` says where they came from."""

    chosen: Sample
    rejected: Sample
    chosen_reward: float
    rejected_reward: float
    seed_id: str


@dataclass(frozen=True)
class Member:
    """One completion with its advantage. `weight` 0: counted in the baseline, gets no gradient."""

    sample: Sample
    reward: float
    advantage: float
    weight: float


@dataclass(frozen=True)
class Group:
    """Completions that share a baseline (or an average)."""

    members: tuple[Member, ...]


def clip_rejected(chosen: Sample, rejected: Sample) -> Sample:
    """A rejected completion that hit max length is cut to the chosen one's length if it is longer."""
    length = len(chosen.token_ids)
    if rejected.finished or len(rejected.token_ids) <= length:
        return rejected
    return replace(rejected, token_ids=rejected.token_ids[:length], logprobs=rejected.logprobs[:length])


def best_and_worst(samples: Sequence[Sample | None], rewards: Sequence[float | None], seed_id: str) -> Pair | None:
    """The pair of the highest and the lowest reward, the first of equals each; None if all rewards are equal."""
    rewarded = [(r, s) for r, s in zip(rewards, samples, strict=True) if r is not None and s is not None]
    if not rewarded:
        return None
    best = max(rewarded, key=lambda item: item[0])
    worst = min(rewarded, key=lambda item: item[0])
    if best[0] == worst[0]:
        return None
    return Pair(best[1], clip_rejected(best[1], worst[1]), best[0], worst[0], seed_id)


def attacker_pairs(trees: Iterable[tuple[Tree, TreeRewards]]) -> list[Pair]:
    """One pair a seed: its best and worst rewarded attack."""
    pairs = (best_and_worst([a.sample for a in t.attacks], r.attacks, t.seed.id) for t, r in trees)
    return [pair for pair in pairs if pair is not None]


def defender_pairs(trees: Iterable[tuple[Tree, TreeRewards]]) -> list[Pair]:
    """One pair an attack: its best and worst rewarded response. Survives a missing Attacker verdict."""
    pairs = (
        best_and_worst([response.sample for response in attack.responses], rewards, tree.seed.id)
        for tree, tree_rewards in trees
        for attack, rewards in zip(tree.attacks, tree_rewards.responses, strict=True)
    )
    return [pair for pair in pairs if pair is not None]


def pairs_of(role: Role, trees: Iterable[tuple[Tree, TreeRewards]]) -> list[Pair]:
    return attacker_pairs(trees) if role is Role.ATTACKER else defender_pairs(trees)


Rewarded = tuple[Sample, float]


def _members_of(role: Role, tree: Tree, rewards: TreeRewards) -> Iterator[Rewarded]:
    """Every rewarded completion of one player in one seed's tree."""
    if role is Role.ATTACKER:
        for attack, reward in zip(tree.attacks, rewards.attacks, strict=True):
            if attack.sample is not None and reward is not None:
                yield attack.sample, reward
        return
    for attack, group in zip(tree.attacks, rewards.responses, strict=True):
        for response, reward in zip(attack.responses, group, strict=True):
            if response.sample is not None and reward is not None:
                yield response.sample, reward


def groups_of(
    role: Role, trees: Iterable[tuple[Tree, TreeRewards]], *, across_seeds: bool, learn_from_failed: bool = False
) -> list[Group]:
    """GRPO groups: one a seed (its A attacks, or its A x D responses), advantage = reward - baseline.

    The baseline is the mean over all rewards of the batch (`across_seeds`) or of the seed. Failed samples (-1)
    count in it and carry weight 0, unless `learn_from_failed` (Self-RedTeam penalises formatting failures).
    """
    rewarded = [list(_members_of(role, tree, rewards)) for tree, rewards in trees]
    rewarded = [members for members in rewarded if members]
    everything = [reward for members in rewarded for _, reward in members]
    batch_mean = sum(everything) / len(everything) if everything else 0.0

    groups = []
    for members in rewarded:
        baseline = batch_mean if across_seeds else sum(reward for _, reward in members) / len(members)
        groups.append(
            Group(
                tuple(
                    Member(sample, reward, reward - baseline, float(learn_from_failed or reward != FAILED))
                    for sample, reward in members
                )
            )
        )
    return groups
