"""Run by torchrun: checkpoints of sharded learners. zero_saves.py PLAYER FOLDER save|kill|read ATTACKER_RANKS

save: learners of several stages save, read each other's checkpoints, and ranks fail. kill: one dies while it writes.
read: what `save` left is read by other ranks, and saved again. Rank 0 writes what it found, as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import models
import saved
from zero_ranks import pairs

from advgame.errors import InputError
from advgame.learn import part_files, zero_files
from advgame.learn.settings import LearnSettings
from advgame.learn.shards import MOMENTS
from advgame.learn.team import joined
from advgame.learn.zero_learner import DeepSpeedLearner
from advgame.run.checkpoint import begin_checkpoint, finish_checkpoint
from advgame.run.checkpoint_files import checkpoint_problem

STAGES = (0, 2, 3)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor for which an operation has taken memory inside; views and outlines take none."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        given, own = (
            {t.untyped_storage().data_ptr(): t.numel() for t in tree_leaves(some) if isinstance(t, torch.Tensor)}
            for some in ((arguments, named), made)
        )
        self.elements = max([self.elements, *(n for pointer, n in own.items() if pointer not in given)])
        return made


class Failing:
    """What the last rank does, as a file says that rank 0 writes."""

    def __init__(self, folder: Path):
        self.file = folder / "fails"
        if int(os.environ["RANK"]) != int(os.environ["WORLD_SIZE"]) - 1:
            return
        write, save, blind = zero_files.write_part, part_files.save_file, zero_files.Files._blind

        def written(*arguments):
            if self.says("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            write(*arguments)

        def stored(*arguments, **how):
            if self.says("full"):
                raise OSError(28, "No space left on device")
            save(*arguments, **how)

        def blinded(own, folder, *, writes):
            return blind(own, folder / "elsewhere" if self.says("blind") else folder, writes=writes)

        zero_files.write_part, part_files.save_file, zero_files.Files._blind = written, stored, blinded
        zero_files.SEEN_S = 0.2

    def says(self, what: str) -> bool:
        return self.file.is_file() and self.file.read_text() == what

    def raised(self, what: str, work) -> str:
        self.file.write_text(what)
        try:
            work()
        except InputError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.file.unlink()
        return ""


def gathered(learner) -> dict[str, torch.Tensor]:
    """Everything that the ranks hold, in ways that no checkpoint takes."""
    kinds = ("live", "shadow", "previous", *MOMENTS)
    return {f"{kind} {name}": t.clone() for kind in kinds for name, t in learner._gathered(kind)}


def unequal(ours, theirs, kinds=()) -> list[str]:
    """Names of what differs by a bit, of `kinds` if any are given."""
    return [
        name
        for name in ours.keys() | theirs.keys()
        if (not kinds or name.split(" ")[0] in kinds)
        and not (name in ours and name in theirs and torch.equal(ours[name], theirs[name]))
    ]


def of_folders(path: Path) -> dict[str, torch.Tensor]:
    """As transformers reads them."""
    found = {}
    for kind, folder in (("live", "player"), ("shadow", "player-ema")):
        model = AutoModelForCausalLM.from_pretrained(path / folder)
        assert model.dtype == torch.float32
        found |= {f"{kind} {name}": p.detach() for name, p in model.named_parameters()}
    return found


def main(player: Path, folder: Path, what: str, attacker_ranks: int | None, failing: Failing) -> dict:
    tokenizer, numbers = models.tokenizer(), count()
    base = {"lr": 1e-3, "micro_tokens": 64, "reference": "recompute"}

    def sharded(stage):
        how = {"backend": "deepspeed", "deepspeed": {"stage": stage, "attacker_ranks": attacker_ranks}}
        who = f"{'defender' if attacker_ranks else 'player'}.{next(numbers)}"
        return DeepSpeedLearner(player, tokenizer, LearnSettings(**base, **how), field=who, ahead=True)

    def learned(learner, updates=2):
        served = {n: torch.zeros(tuple(p.shape)) for n, p in learner.published.items()}
        for i in range(updates):
            learner.update_pairs(pairs(3 + i), 0.3)
            learner.publish_into(served)
        return learner

    results: dict[str, object] = {}
    if what == "kill":
        learner = learned(sharded(2))
        saved.save(learner, folder / "checkpoints", 1)
        failing.raised("kill", lambda: saved.save(learner, folder / "checkpoints", 2))
        raise AssertionError("torchrun ends everybody when a rank has died")
    if what == "read":
        for stage in STAGES:
            path, expected = folder / f"{stage}" / "step-000001", load_file(folder / f"{stage}.safetensors")
            here = sharded(3 - stage)
            saved.load(path, here)
            results[f"{stage} unequal"] = unequal(gathered(here), expected)
            makes = saved.save(here, folder / f"again-{os.environ['WORLD_SIZE']}-{stage}")
            results[f"{stage} again"] = unequal(of_folders(makes), expected, ("live", "shadow"))
            results[f"{stage} files"] = sorted(p.relative_to(makes).as_posix() for p in makes.rglob("*.safetensors"))
        return results

    for stage in STAGES:
        learner = learned(sharded(stage))
        before = gathered(learner)
        save_file(before, folder / f"{stage}.safetensors")
        state = saved.state(learner)
        tensors = [*state.players["player"].model.parameters(), *state.players["player"].shadow.values()]
        results[f"{stage} on rank 0"] = sorted({tensor.device.type for tensor in tensors})
        run = saved.folder_of(folder / f"{stage}")
        with Largest() as largest:
            begun = begin_checkpoint(run, state, beside=True)
        results[f"{stage} largest"] = largest.elements
        other = learned(sharded(stage), 1)
        learned(learner, 1)  # while it is written: from copies
        path = finish_checkpoint(run, begun, 3)
        results[f"{stage} problem"] = checkpoint_problem(path)
        files = {p.relative_to(path).as_posix(): p.stat().st_size for p in path.rglob("*.safetensors")}
        results[f"{stage} files"] = files
        results[f"{stage} folders"] = unequal(of_folders(path), before, ("live", "shadow"))
        plain = saved.plain_of(path, learner, player)
        results[f"{stage} plain"] = unequal(saved.tensors_of(plain), before, ("live", "shadow", "previous", *MOMENTS))
        results[f"{stage} steps"] = float(plain.optimizer.state[plain.parameters["model.norm.weight"]]["step"])
        saved.load(path, other)
        results[f"{stage} read"] = unequal(gathered(other), before)
        # the same update of both, from the same state: bit for bit
        results[f"{stage} next"] = unequal(gathered(learned(other, 1)), gathered(learner))
        # and what one process saves is read by ranks
        from_plain = saved.save(plain, folder / f"plain-{stage}")
        saved.load(from_plain, other)
        results[f"{stage} of plain"] = unequal(gathered(other), before)
    results["elements"] = sum(t.numel() for n, t in before.items() if n.startswith("live"))
    results["largest"] = max(t.numel() for n, t in before.items() if n.startswith("live"))

    fresh = sharded(2)  # before the first update there are no moments, and no trees need the average before
    saved.load(saved.save(fresh, folder / "fresh"), learner)
    results["fresh"] = unequal(gathered(learner), gathered(fresh), ("live", "shadow"))

    kept = saved.save(other, folder / "failing", 1)
    for kind in ("full", "blind"):
        results[kind] = failing.raised(kind, lambda: saved.save(other, folder / "failing", 2))
    results["blind start"] = failing.raised("blind", lambda: other.check_folder(folder))
    results["blind read"] = failing.raised("blind", lambda: saved.load(kept, other))
    results["left"] = sorted(p.name for p in (folder / "failing").iterdir())
    results["kept"] = checkpoint_problem(kept)
    next(iter(sorted(kept.glob("optimizer-player-*")))).unlink()
    results["missing"] = failing.raised("nothing", lambda: saved.load(kept, other, verify=False))
    saved.save(other, folder / "failing", 3)  # all ranks are still there
    results["last"] = checkpoint_problem(folder / "failing" / "step-000003")
    return results


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, repeat=True)  # a rank that waits for another says where
    given, place, job, alone = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) or None
    fails = Failing(place)
    with joined(1, alone) as leads:
        if leads:
            (place / f"{job}.json").write_text(json.dumps(main(given, place, job, alone, fails)))
