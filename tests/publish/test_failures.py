"""Publishing that goes wrong, and what a publish must not leave behind: stale caches, shared memory, growth."""

import asyncio
import os
import signal
import time
from pathlib import Path

import engines
import models
import pytest
import torch
from test_shm import PROMPTS, assert_serves, greedy, writer

from advgame.errors import InputError
from advgame.publish.channels import AutoChannel, ShmChannel
from advgame.publish.plan import sources_of
from advgame.rollout import vllm_start
from advgame.rollout.engine import EngineDied, EngineError

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    return [models.model(seed=s, hidden=engines.HIDDEN) for s in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return engines.folder(tmp_path_factory.mktemp("m") / "m", seed=0)


def opened(runner, folder, model, **kwargs):
    vllm = engines.settings(**kwargs.pop("vllm", {}))
    engine = engines.vllm_engine(
        folder, channel=ShmChannel("m", sources_of(model.named_parameters())), vllm=vllm, **kwargs
    )
    runner.run(engine.start())
    return engine


@pytest.fixture
def engine(runner, folder, pair):
    made = opened(runner, folder, pair[0], restore=writer(pair[1]))
    yield made
    runner.run(made.close())


def kill(engine):
    for pid in engine.process_ids:
        os.kill(pid, signal.SIGKILL)


def test_death_in_mid_publish_restarts_at_the_new_version(runner, engine, pair):
    """The engine dies while the trainer writes: the write stands, the new engine is given the same weights."""
    calls = []

    def write(served):
        calls.append(1)
        writer(pair[1])(served)
        kill(engine)

    start = time.perf_counter()
    runner.run(engine.publish(1, write))
    assert time.perf_counter() - start < 180  # an engine starts in 10 s where nothing else runs
    assert (len(calls), engine.version) == (1, 1)
    assert engine.counters["defender_restarts"] == engine.counters["defender_publish_failures"] == 1
    assert_serves(runner, engine, pair[1], 1)
    runner.run(engine.publish(2, writer(pair[0])))
    assert_serves(runner, engine, pair[0], 2)


@pytest.mark.parametrize("part", ["pause", "reset_caches", "stamp", "resume"])
def test_death_in_any_part_of_a_publish_is_typed_within_five_seconds(runner, engine, pair, monkeypatch, part):
    """Requests in flight hear of it in time, though a new engine takes longer to start; none comes from a mixture."""
    answered: list[float] = []

    async def ask(i):
        try:
            return await engine.generate(engines.request(PROMPTS[0], i, max_tokens=200))
        finally:
            answered.append(time.perf_counter())

    async def run():
        calls, died = getattr(vllm_start, part), []

        async def deadly(llm, *rest):
            if not died:
                died.append(time.perf_counter())
                kill(engine)
            return await calls(llm, *rest)

        monkeypatch.setattr(vllm_start, part, deadly)
        busy = [asyncio.create_task(ask(i)) for i in range(300)]
        await asyncio.sleep(0.05)
        await engine.publish(1, writer(pair[1]))
        return await asyncio.gather(*busy, return_exceptions=True), died[0]

    engine.settings.in_flight = "keep"
    answers, died = runner.run(run())
    engine.settings.in_flight = "finish"
    assert any(isinstance(a, EngineDied) for a in answers)
    assert all(isinstance(a, EngineDied) or a.version == 0 for a in answers)
    assert max(answered) - died < 5
    assert engine.version == 1
    assert_serves(runner, engine, pair[1], 1)


def test_requests_in_flight_when_a_publish_fails_are_typed(runner, engine, pair, monkeypatch):
    """A part of the protocol fails; nobody is ever served from the half-published engine."""

    async def broken(llm):
        raise RuntimeError("no")

    monkeypatch.setattr(vllm_start, "reset_caches", broken)

    async def run():
        requests = [engines.request(PROMPTS[0], i, max_tokens=200) for i in range(300)]
        busy = [asyncio.create_task(engine.generate(r)) for r in requests]
        await asyncio.sleep(0.05)
        publishing = asyncio.create_task(engine.publish(1, writer(pair[1])))
        while not engine.counters["defender_publish_failures"]:
            await asyncio.sleep(0.001)
        monkeypatch.undo()
        await publishing
        return await asyncio.gather(*busy, return_exceptions=True)

    engine.settings.in_flight = "keep"
    answers = runner.run(run())
    engine.settings.in_flight = "finish"
    assert all(isinstance(a, EngineDied) or a.version == 0 for a in answers)
    assert any(isinstance(a, EngineDied) for a in answers)
    assert_serves(runner, engine, pair[1], 1)


def test_a_checksum_that_differs_poisons_the_engine(runner, folder, pair):
    """A parameter that no longer lives in the arena is found, and the replaced engine is right."""
    engine = opened(runner, folder, pair[0], restore=writer(pair[1]), vllm={"verify_every": 1})
    try:
        runner.run(engine.publish(1, writer(pair[1])))
        assert engine.counters["defender_restarts"] == 0
        channel = engine._channel
        right = channel.checksums
        wrong = [{name: 1 + n for name, n in right()[0].items()}]
        channel.checksums = lambda: right() if engine._restarts else wrong
        runner.run(engine.publish(2, writer(pair[1])))
        assert engine.counters["defender_restarts"] == engine.counters["defender_publish_failures"] == 1
        assert_serves(runner, engine, pair[1], 2)
    finally:
        runner.run(engine.close())


def test_an_error_of_the_trainer_comes_through_as_it_is(runner, engine, pair):
    def write(served):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runner.run(engine.publish(1, write))
    assert engine.process_ids == []


def test_a_cancelled_start_leaves_no_process(runner, folder, monkeypatch):
    seen = []

    async def hanging(process):
        seen.extend(process.process_ids)
        await asyncio.sleep(100)

    async def run():
        starting = asyncio.create_task(engines.vllm_engine(folder).start())
        while not seen:
            await asyncio.sleep(0.05)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    monkeypatch.setattr("advgame.rollout.vllm_open.guard", hanging)
    runner.run(run())
    assert seen
    give_up = time.monotonic() + 5
    while any(engines.running(pid) for pid in seen):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_cancelled_publish_poisons_the_engine(runner, engine, pair, monkeypatch):
    """Cancelled after the write: the engine, still paused, is never served again; the next one has the new weights."""
    reached = asyncio.Event()

    async def hanging(llm):
        reached.set()
        await asyncio.sleep(100)

    async def run():
        publishing = asyncio.create_task(engine.publish(1, writer(pair[1])))
        await reached.wait()
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing

    monkeypatch.setattr(vllm_start, "reset_caches", hanging)
    runner.run(run())
    monkeypatch.undo()
    assert engine.process_ids == []
    assert_serves(runner, engine, pair[1], 1)


def test_restarts_end(runner, folder, pair):
    engine = opened(runner, folder, pair[0], vllm={"restarts": 0})
    try:
        kill(engine)
        answers = engines.play(runner, engine, [engines.request(PROMPTS[0])] * 2)
        assert all(isinstance(a, EngineDied) for a in answers)
        answers = engines.play(runner, engine, [engines.request(PROMPTS[0])])
        assert "restarted 0 times already" in str(answers[0])
    finally:
        runner.run(engine.close())


@pytest.mark.parametrize("mode", ["finish", "keep", "abort"])
def test_requests_in_flight(runner, engine, pair, mode):
    """finish: one version to the end; keep: each token from the weights of its time, nothing stale; abort: retried."""
    engine.settings.in_flight = mode
    most = 200

    async def run():
        engine.first_token.published(time.perf_counter())  # has the first request watched
        busy = [
            asyncio.create_task(engine.generate(engines.request(p, i, max_tokens=most, temperature=0.0)))
            for i, p in enumerate(PROMPTS * 8)
        ]
        await engines.until(lambda: engine.first_token.seconds > 0, 10)
        await engine.publish(1, writer(pair[1]))
        return await asyncio.gather(*busy, return_exceptions=True)

    answers = runner.run(run())
    if mode == "abort":
        assert any(isinstance(a, EngineError) and "abort" in str(a) for a in answers)
    else:
        assert 0 in {a.version for a in answers}, "none was under way"
    for sample in answers:
        if isinstance(sample, EngineError):
            continue
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        rows = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        gaps = []
        for model in pair:
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].log_softmax(-1)[rows, torch.tensor(sample.token_ids)]
            gaps.append((logps - torch.tensor(sample.logprobs)).abs())
        old, new = gaps
        # one switch from the old weights to the new ones, each log-prob exact on its side of it
        switch = int((old < 1e-3).long().cumprod(0).sum())
        if mode == "finish":
            assert switch in (0, len(old))  # 0: vLLM had not begun with it when it was asked to finish
        assert (new[switch:] < 1e-3).all()
        assert sample.version == (0 if switch else 1)
    assert_serves(runner, engine, pair[1], 1)


def test_the_prefix_cache_forgets_old_weights(runner, engine, pair):
    """The same long prompt before and after: its cached prefix must not survive the publish."""
    prompt = tuple(3 + i % 20 for i in range(150))
    for version, model in ((1, pair[1]), (2, pair[0]), (3, pair[1])):
        runner.run(engine.publish(version, writer(model)))
        for _ in range(2):
            (sample,) = engines.play(runner, engine, [engines.request(prompt, temperature=0.0, max_tokens=48)])
            assert list(sample.token_ids) == greedy(model, prompt).tolist()


def test_weights_of_another_architecture_are_one_clear_line(runner, folder):
    """The trainer's model has heads of its own, the engine's folder has tied ones; no fall-back was asked for."""
    other = models.model(tied=False, hidden=engines.HIDDEN)
    channel = ShmChannel("m", sources_of(other.named_parameters()))
    engine = engines.vllm_engine(folder, channel=channel, vllm=engines.settings(transport="shm"))
    says = r"rollout\.vllm\.transport: shm cannot write .* where defender reads it: .*lm_head.weight.*set loader"
    with pytest.raises(InputError, match=says):
        runner.run(engine.start())
    assert engine.process_ids == []


def test_two_hundred_publishes_do_not_grow(runner, engine, pair):
    def resident(pid):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def publish(count, first):
        for i in range(count):
            runner.run(engine.publish(first + i, writer(pair[i % 2])))
        return [resident(pid) for pid in (os.getpid(), *engine.process_ids)]

    before = publish(60, 1)
    after = publish(200, 61)
    growth = [b - a for a, b in zip(before, after, strict=True)]
    assert max(growth) < 2**20, growth
    assert engine.version == 260


def test_a_plan_that_is_refused_goes_through_the_loader_and_says_so(runner, folder, pair):
    sources = [s for s in sources_of(pair[0].named_parameters()) if s.name != "model.norm.weight"]
    channel = AutoChannel("m", sources, "float32")
    engine = engines.vllm_engine(folder, channel=channel)

    def write(served):
        with torch.no_grad():
            for name, parameter in pair[1].named_parameters():
                if name in served:
                    served[name].copy_(parameter)

    try:
        runner.run(engine.start())
        assert channel.notes == (
            "weights go through vLLM's loader, which is slower: 128 elements of model.norm.weight come from no source",
        )
        runner.run(engine.publish(1, write))
        assert_serves(runner, engine, pair[1], 1)  # both norms are ones
    finally:
        runner.run(engine.close())
