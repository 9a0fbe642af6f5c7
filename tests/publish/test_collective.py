"""Weights broadcast in buckets into live vLLM engines on the CPU, through gloo: right tokens, two workers, deaths."""

import os
import signal
import time

import engines
import models
import pytest
import torch
from test_shm import assert_serves, writer

from advgame.publish.collective import CollectiveChannel
from advgame.publish.plan import sources_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def opened(runner, tmp_path, first, *, tied=True, **kwargs):
    settings = engines.settings(verify_every=1, bucket_mib=1, transport="collective", **kwargs.pop("vllm", {}))
    channel = CollectiveChannel("m", sources_of(first.named_parameters()), torch.device("cpu"), settings)
    engine = engines.vllm_engine(
        engines.folder(tmp_path / "m", tied=tied, seed=0), channel=channel, vllm=settings, **kwargs
    )
    runner.run(engine.start())
    return engine, channel


def test_buckets_reach_two_workers(runner, tmp_path):
    first, second = (models.model(seed=s, hidden=engines.HIDDEN, tied=False) for s in (0, 1))
    engine, channel = opened(runner, tmp_path, first, tied=False, vllm={"tensor_parallel": 2}, restore=writer(first))
    try:
        assert len(channel.plans) == 2
        assert_serves(runner, engine, first, 0)
        for version, model in ((1, second), (2, first)):
            runner.run(engine.publish(version, writer(model)))
            assert_serves(runner, engine, model, version)
        assert not {k: v for k, v in engine.counters.items() if v and not k.endswith("_tokens")}
    finally:
        runner.run(engine.close())


def test_a_live_engine_takes_buckets_and_is_replaced_when_it_dies(runner, tmp_path):
    first, second = (models.model(seed=s, hidden=engines.HIDDEN) for s in (0, 1))
    engine, channel = opened(runner, tmp_path, first, restore=writer(second))
    try:
        assert channel.layout is not None
        for version, model in ((1, second), (2, first)):
            runner.run(engine.publish(version, writer(model)))
            assert_serves(runner, engine, model, version)
        runner.run(engine._process.collective_rpc("advgame_zero"))
        runner.run(engine.publish(3, writer(second)))
        assert_serves(runner, engine, second, 3)
        assert not {k: v for k, v in engine.counters.items() if v and not k.endswith("_tokens")}

        def deadly(served):
            writer(second)(served)
            for pid in engine.process_ids:
                os.kill(pid, signal.SIGKILL)

        start = time.perf_counter()
        runner.run(engine.publish(4, deadly))
        assert time.perf_counter() - start < 60
        assert engine.counters["defender_restarts"] == engine.counters["defender_publish_failures"] == 1
        assert_serves(runner, engine, second, 4)
    finally:
        runner.run(engine.close())
