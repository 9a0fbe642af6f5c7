"""Run by torchrun: sharded learners against the plain one, on one rank or more. zero_ranks.py PLAYER OUT ATTACKER_RANKS

Rank 0 computes what the plain learner does, drives the sharded ones, and writes how far they are apart, as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import models
import saved

from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn.learner import Learner
from advgame.learn.settings import LearnSettings
from advgame.learn.team import joined
from advgame.learn.trainer import Trainer

PERSISTENCE = "persistence"
CASES = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    # every parameter is partitioned, however small, and gathered in many small buckets
    "user's file": {"stage": None, "config": PERSISTENCE},
}
UPDATES = (5, 1, 3)  # pairs: uneven, too few for two ranks, uneven


def sample(*tokens: int, prompt: int) -> Sample:
    return Sample((3, 9, prompt, 4), tokens, tuple(-1.0 - 0.1 * i for i in range(len(tokens))), "stop", 0)


def pairs(number: int) -> list[Pair]:
    made = []
    for i in range(number):
        chosen, rejected = sample(12 + i, 13, 2, prompt=10 + i % 3), sample(14, 15 + i, 16, 17, 2, prompt=10 + i % 3)
        made.append(Pair(chosen, rejected, 9.0, 1.0, f"s{i}"))
    return made


def groups() -> list[Group]:
    a, b, c = sample(12, 2, prompt=10), sample(13, 14, 15, 2, prompt=11), sample(16, 17, 2, prompt=12)
    return [
        Group((Member(a, 4.0, 1.5, 1.0), Member(b, -1.0, -3.5, 0.0))),
        Group((Member(c, 2.0, -0.5, 1.0), Member(b, 6.0, 2.5, 1.0))),
    ]


class Course:
    """What a learner goes through, and everything that comes of it, by name."""

    def __init__(self, make, player, **settings):
        self.numbers: dict[str, float] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        base = {"lr": 1e-3, "micro_tokens": 24, "clip_norm": 0.5}
        self.make, self.player, self.settings = make, player, base | settings

    def pairs(self, **more) -> Course:
        learner = self.make(LearnSettings(**self.settings, **more), ahead=True)
        served = {n: torch.zeros(tuple(p.shape)) for n, p in learner.published.items()}
        for i, number in enumerate(UPDATES):
            found = learner.update_pairs(pairs(number), 0.3)
            self.numbers |= {f"{i} {name}": value for name, value in found.items()}
            learner.publish_into(served)
        gap = learner.sampler_gap([p.chosen for p in pairs(3)])
        self.numbers |= {"gap": gap.mean, "largest gap": gap.largest}
        self.tensors |= {f"served {name}": tensor for name, tensor in served.items()}
        return self.state(learner)

    def groups(self, **more) -> Course:
        learner = self.make(LearnSettings(**self.settings, **more), ema=False)
        for i in range(2):
            self.numbers |= {f"{i} {name}": value for name, value in learner.update_groups(groups(), 0.0).items()}
        return self.state(learner)

    @classmethod
    def of(cls, learner: Trainer, numbers: dict[str, float], player: Path) -> Course:
        made = cls(None, player)
        made.numbers = dict(numbers)
        return made.state(learner)

    def state(self, learner: Trainer) -> Course:
        if not isinstance(learner, Learner):
            with tempfile.TemporaryDirectory() as folder:
                plain = saved.plain_of(saved.save(learner, Path(folder)), learner, self.player)
        self.tensors |= saved.tensors_of(learner if isinstance(learner, Learner) else plain)
        self.learner = learner
        return self


def apart(ours: Course, theirs: Course) -> dict[str, float]:
    """The largest gap of every kind of result; of moments as a share of their size."""
    assert ours.numbers.keys() == theirs.numbers.keys(), ours.numbers.keys() ^ theirs.numbers.keys()
    assert ours.tensors.keys() == theirs.tensors.keys(), ours.tensors.keys() ^ theirs.tensors.keys()
    # how prompts fall together in micro-batches decides these, not what is learned
    counted = ("tokens", "tokens_saved", "reference_change")
    gaps = {
        f"metric {n}": abs(v - theirs.numbers[n]) / max(1.0, abs(theirs.numbers[n]))
        for n, v in ours.numbers.items()
        if n.split(" ")[-1] not in counted
    }
    for name, tensor in ours.tensors.items():
        other = theirs.tensors[name].double()
        scale = float(other.abs().max()) if name.startswith("exp_avg") else 1.0
        kind = name.split(" ")[0]
        gaps[kind] = max(gaps.get(kind, 0.0), float((tensor.double() - other).abs().max()) / (scale or 1.0))
    return gaps


def main(player: Path, out: Path, attacker_ranks: int | None) -> None:
    from advgame.learn.zero_learner import DeepSpeedLearner

    file = out.with_suffix(".deepspeed.json")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500, "sub_group_size": 3000}
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto", "gradient_clipping": 0.5}))
    tokenizer = models.tokenizer()
    numbers = count()
    who = "defender" if attacker_ranks else "player"

    def plain(settings, folder=player, **how):
        return Learner(folder, tokenizer, settings, field="defender.model", **how)

    def sharded(settings, folder=player, **how):  # many live at once: each needs a name of its own on all ranks
        return DeepSpeedLearner(folder, tokenizer, settings, field=f"{who}.{next(numbers)}", **how)

    objectives = {
        "dpo": lambda make, **how: Course(make, player).pairs(reference="recompute", **how),
        "auto": lambda make, **how: Course(make, player).pairs(reference="auto", objective="ipo", **how),
        "grpo": lambda make, **how: Course(make, player).groups(objective="grpo", **how),
        "reinforce": lambda make, **how: Course(make, player).groups(objective="reinforce", **how),
    }
    if attacker_ranks:
        del objectives["auto"], objectives["reinforce"]
    want = {name: play(plain) for name, play in objectives.items()}
    weight = "model.embed_tokens.weight"
    moved = want["dpo"].tensors[f"live {weight}"] - models.model().get_parameter(weight).detach()
    results: dict[str, dict[str, float]] = {"plain": {"moved": float(moved.abs().max())}}
    last = want["dpo"].learner
    for case, chosen in CASES.items():
        chosen = chosen | {"config": str(file)} if "config" in chosen else chosen
        how = {"backend": "deepspeed", "deepspeed": chosen | {"attacker_ranks": attacker_ranks}}
        made = {name: play(sharded, **how) for name, play in objectives.items()}
        for name, course in made.items():
            results[f"{case}, {name}"] = apart(course, want[name])
        # what the learner before has learned goes on in this one as it does there
        here = made["grpo"].make(LearnSettings(**made["dpo"].settings, reference="recompute", **how), ahead=True)
        with tempfile.TemporaryDirectory() as folder:
            saved.load(saved.save(last, Path(folder)), here)
        ends = [Course.of(learner, learner.update_pairs(pairs(3), 0.5), player) for learner in (here, last)]
        results[f"{case}, taken"] = apart(*ends)
        last = here
    if attacker_ranks is None:
        untied = models.folder(out.with_suffix(".untied"), tied=False)
        how = {"backend": "deepspeed", "deepspeed": {"stage": 3}}
        course = Course(partial(sharded, folder=untied), untied).pairs(reference="recompute", **how)
        want = Course(partial(plain, folder=untied), untied).pairs(reference="recompute")
        results["stage 3, untied"] = apart(course, want)
        narrow = Course(plain, player).pairs(reference="recompute", dtype="bfloat16")
        for stage in range(4):
            how = {"backend": "deepspeed", "deepspeed": {"stage": stage}}
            course = Course(sharded, player).pairs(reference="recompute", dtype="bfloat16", **how)
            results[f"stage {stage}, bfloat16"] = apart(course, narrow)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, repeat=True)  # a rank that waits for another says where
    alone = int(sys.argv[3]) or None
    with joined(1, alone) as leads:
        if leads:
            main(Path(sys.argv[1]), Path(sys.argv[2]), alone)
