"""Run by torchrun: sharded learners publish from all ranks. shard_ranks.py fake|live PLAYER OUT ATTACKER_RANKS

fake: workers in threads of rank 0, with the workers' own code around a model that loads like an engine's. live: vLLM.
Rank 0 writes what it found as JSON.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import engines
import models
from zero_ranks import PERSISTENCE, pairs

from advgame.learn.settings import LearnSettings
from advgame.learn.team import joined
from advgame.publish.plan import sources_of
from advgame.publish.sharded import ShardsChannel
from advgame.rollout.channel import written_into
from advgame.rollout.engine import EngineDied
from advgame.rollout.replicas import ReplicaEngine
from advgame.rollout.vllm_process import launch_threaded

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
PROMPTS = [(3, 9, 10), (3, 9, 10, 11, 12, 13), (3, 14)]


class EngineModel(nn.Module):
    """Loads a Qwen2 as vLLM does: fused projections, columns of their outputs, padded vocabulary, tied head; sliced."""

    def __init__(self, shapes, rank, world, dtype):
        super().__init__()
        self.rank, self.world, self.shapes = rank, world, shapes
        sizes = {}
        for name, shape in shapes.items():
            key, rows = self._place(name)[0], self._rows(name, shape)
            sizes.setdefault(key, [0, self._columns(name, shape)])[0] += rows
        for key, (rows, columns) in sizes.items():
            shape = (rows,) if columns is None else (rows, columns)
            self.register_parameter(key, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        if "lm_head_weight" not in sizes:
            self.head = self.model_embed_tokens_weight

    def _place(self, name):
        """(parameter, those that stand before this one in it)."""
        for part, fused in FUSED.items():
            if part in name:
                before = [one for one in FUSED if FUSED[one] == fused]
                others = [name.replace(part, one) for one in before[: before.index(part)]]
                return name.replace(part, fused).replace(".", "_"), others
        return name.replace(".", "_"), []

    def _rows(self, name, shape):
        if "embed" in name or "lm_head" in name:
            return -(-shape[0] // 64) * 64 // self.world
        return shape[0] // self.world if self._fused(name) else shape[0]

    def _columns(self, name, shape):
        if len(shape) == 1:
            return None
        return shape[1] // self.world if "o_proj" in name or "down_proj" in name else shape[1]

    @staticmethod
    def _fused(name):
        return any(part in name for part in FUSED)

    def load_weights(self, weights):
        for name, tensor in weights:
            key, others = self._place(name)
            into, rows = getattr(self, key).data, self._rows(name, tuple(tensor.shape))
            if "embed" in name or "lm_head" in name:
                own = tensor[self.rank * rows : (self.rank + 1) * rows]
                into[: own.shape[0]].copy_(own)
                into[own.shape[0] :].fill_(0)
            elif self._fused(name):
                before = sum(self._rows(other, self.shapes[other]) for other in others)
                into.narrow(0, before, rows).copy_(tensor.narrow(0, self.rank * rows, rows))
            elif tensor.dim() == 2:
                into.copy_(tensor.chunk(self.world, 1)[self.rank])
            else:
                into.copy_(tensor)


class FakeLlm:
    """`collective_rpc` to workers in threads. deaf: it dies in its next publish, which is known after a while."""

    def __init__(self, shapes, world, dtype):
        from advgame.publish.worker import PublishWorker

        self.deaf, self.workers = False, []
        for rank in range(world):
            worker, members = PublishWorker(), []
            place = SimpleNamespace(rank=rank, world_size=world)
            how = SimpleNamespace(quantization=None, use_mla=False, is_moe=False, dtype=dtype)
            worker.vllm_config = SimpleNamespace(parallel_config=place, model_config=how, quant_config=None)
            model = EngineModel(shapes, rank, world, dtype)
            worker.model_runner = SimpleNamespace(get_model=lambda model=model: model)
            worker.weight_transfer_engine = SimpleNamespace(
                plan=None, flats={}, groups=members, unpacker=None, pieces=None, store=None, shutdown=members.clear
            )
            self.workers.append(worker)

    async def collective_rpc(self, method, args=()):
        if self.deaf and method == "advgame_receive_ranks":
            await asyncio.sleep(0.5)
            for worker in self.workers:
                worker.weight_transfer_engine.shutdown()
                worker.weight_transfer_engine.pieces = None
            raise EngineDied("the engine's process ended")
        return await asyncio.gather(*(asyncio.to_thread(getattr(w, method), *args) for w in self.workers))


async def published(channel, llm, write, verify=True):
    async with channel.turn():
        written_into(channel, write, verify=False)
        await channel.deliver(llm, verify=verify)


def holds(llm, learner, dtype):
    """Whether every worker holds, bit for bit, what it would load of the learner's average."""
    whole = dict(learner._gathered("shadow"))
    for rank, worker in enumerate(llm.workers):
        model = worker.model_runner.get_model()
        loaded = EngineModel({n: tuple(t.shape) for n, t in whole.items()}, rank, len(llm.workers), dtype)
        loaded.load_weights([(name, tensor.to(dtype)) for name, tensor in whole.items()])
        if not all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)):
            return False
    return True


async def raised(work):
    """(name of what it raised, its words, seconds)."""
    start = time.perf_counter()
    try:
        await work
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


async def fake(make, cases):
    results = {}
    settings = engines.settings(transport="collective", publish_timeout_s=20.0, start_timeout_s=30.0, bucket_mib=1)
    for case, how in cases.items():
        learner = make(how)
        shapes = {name: tuple(tensor.shape) for name, tensor in learner.published.items()}
        sources = sources_of(learner.published.items())
        equal = []
        for number, (world, dtype) in enumerate(((1, torch.float32), (2, torch.bfloat16))):
            llm = FakeLlm(shapes, world, dtype)
            channel = ShardsChannel("m", sources, learner.senders, settings, str(number))
            await channel.attach(llm)
            learner.update_pairs(pairs(3), 0.0)
            await published(channel, llm, learner.publish_into)
            assert learner.averages == number + 1
            equal.append(holds(llm, learner, dtype))
            for worker in llm.workers:
                worker.advgame_zero()
            await published(channel, llm, learner.serve_into, verify=False)
            equal.append(holds(llm, learner, dtype))
        results[case] = {"equal": all(equal), "senders": len(learner.senders.held), "notes": channel.notes}

    # one engine dies while it is sent to; the other one, and the ranks, go on
    dtype = torch.float32
    dying, other = FakeLlm(shapes, 1, dtype), FakeLlm(shapes, 1, dtype)
    first, second = (ShardsChannel("m", sources, learner.senders, settings, key) for key in "ab")
    await asyncio.gather(first.attach(dying), second.attach(other))
    dying.deaf = True
    failing = asyncio.create_task(raised(published(first, dying, learner.publish_into)))
    await asyncio.sleep(0.1)
    start = time.perf_counter()
    await published(second, other, learner.serve_into)
    results["other"] = {"seconds": time.perf_counter() - start, "equal": holds(other, learner, dtype)}
    results["died"] = await failing
    results["left"] = await raised(published(first, dying, learner.serve_into))
    dying.deaf = False
    await first.attach(dying)  # a new start
    await published(first, dying, learner.serve_into)
    results["again"] = {"equal": holds(dying, learner, dtype)}
    return results


class Averaged:
    """The learner's average as a transformers model, and what it says greedily."""

    def __init__(self, learner):
        self.model = models.model(hidden=engines.HIDDEN)
        with torch.no_grad():
            for name, tensor in learner._gathered("shadow"):
                self.model.get_parameter(name).copy_(tensor)
        self.tokens = [self.greedy(prompt) for prompt in PROMPTS]

    def greedy(self, prompt):
        ids = torch.tensor([prompt])
        made = self.model.generate(ids, do_sample=False, max_new_tokens=48, eos_token_id=2, pad_token_id=0)
        return made[0, len(prompt) :].tolist()

    async def served_by(self, engine, version):
        asked = [engines.request(p, i, temperature=0.0, max_tokens=48) for i, p in enumerate(PROMPTS)]
        samples = await asyncio.gather(*(engine.generate(one) for one in asked))
        same = [list(sample.token_ids) for sample in samples] == self.tokens
        return same and {sample.version for sample in samples} == {version}


class Killing:
    """A publish in which the engine stands still, so that the ranks are in the middle of their shards; then it dies."""

    def __init__(self, learner, victim):
        self.learner, self.pids, self.at = learner, victim.process_ids, 0.0

    def write(self, tensors):
        self.learner.publish_into(tensors)
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
        threading.Timer(1.0, self._kill).start()

    def _kill(self):
        self.at = time.perf_counter()
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)


async def one_engine(learner, engine):
    before = Averaged(learner).tokens
    found = [await Averaged(learner).served_by(engine, 0)]
    for version in (1, 2):
        learner.update_pairs(pairs(5), 0.0)
        await engine.publish(version, learner.publish_into)
        found.append(await Averaged(learner).served_by(engine, version))
    return {"found": [*found, Averaged(learner).tokens != before]}


async def replicas(learner, engine):
    made, died = engine.replicas, []
    attempt = made[0].attempt

    async def timed(*arguments):
        died.append(await raised(attempt(*arguments)))
        died.append(time.perf_counter() - killing.at)
        raise EngineDied(died[0][1])

    learner.update_pairs(pairs(5), 0.0)
    await engine.publish(1, learner.publish_into)
    found = [await Averaged(learner).served_by(one, 1) for one in made]
    averages = learner.averages
    learner.update_pairs(pairs(5), 0.0)
    killing, made[0].attempt = Killing(learner, made[0]), timed
    await engine.publish(2, killing.write)
    made[0].attempt = attempt
    found += [await Averaged(learner).served_by(made[1], 2), learner.averages == averages + 1]
    # the dead one comes back with the average that has moved, however the player learns meanwhile
    start = time.perf_counter()
    learner.update_pairs(pairs(5), 0.0)
    learns = time.perf_counter() - start
    await engines.until(lambda: all(seat.up for seat in engine._seats), 120, 0.05)
    found.append(await Averaged(learner).served_by(made[0], 2))
    await engine.publish(3, learner.publish_into)
    found += [await Averaged(learner).served_by(one, 3) for one in made]
    return {"found": found, "died": died, "learns": learns, "counters": engine.counters}


async def live(make, player):
    settings = engines.settings(transport="collective", verify_every=1, bucket_mib=1)

    def opened(learner, count, **how):
        counters, sources = Counter(), sources_of(learner.published.items())
        return [
            engines.vllm_engine(
                player, vllm=settings, restore=learner.serve_into, counters=counters, replica=i,
                channel=ShardsChannel("m", sources, learner.senders, settings, str(i)), **how,
            )
            for i in range(count)
        ]  # fmt: skip

    results = {}
    for case, stage in (("one engine", 2), ("replicas", 3)):
        learner = make({"stage": stage})
        if case == "replicas":
            engine = ReplicaEngine(opened(learner, 2, launch=launch_threaded))
        else:
            (engine,) = opened(learner, 1)
        try:
            await engine.start()
            results[case] = await (replicas if case == "replicas" else one_engine)(learner, engine)
        finally:
            await engine.close()
    return results


def main(kind: str, player: Path, out: Path, attacker_ranks: int | None) -> None:
    from advgame.learn.zero_learner import DeepSpeedLearner

    numbers, who = count(), "defender" if attacker_ranks else "player"

    def make(how):
        zero = {"backend": "deepspeed", "deepspeed": how | {"attacker_ranks": attacker_ranks}}
        settings = LearnSettings(lr=3e-2, micro_tokens=24, ema_decay=0.5, reference="rollout", **zero)
        return DeepSpeedLearner(player, models.tokenizer(), settings, field=f"{who}.{next(numbers)}")

    file = out.with_suffix(".deepspeed.json")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500, "sub_group_size": 3000}
    file.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 1.0}))
    cases = {f"stage {stage}": {"stage": stage} for stage in range(4)}
    cases[PERSISTENCE] = {"stage": None, "config": str(file)}
    out.write_text(json.dumps(asyncio.run(fake(make, cases) if kind == "fake" else live(make, player))))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(300, repeat=True)  # a rank that waits for another says where
    kind, alone = sys.argv[1], int(sys.argv[4]) or None
    with joined(1, alone) as leads:
        if leads:
            main(kind, Path(sys.argv[2]), Path(sys.argv[3]), alone)
