"""Sampling in a child process: the same bits, weights through shared memory, deaths, errors, and its end."""

import asyncio
import os
import signal

import models
import pytest
import torch

from advgame.rollout import sampler_process
from advgame.rollout.engine import EngineError, Request, Sampling, stream_seed
from advgame.rollout.sampler_process import SamplerProcess
from advgame.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.slow

PROMPTS = [(3, 9, 10), (3, 9, 10, 11, 12, 13), (3, 14)]


def request(n, **sampling):
    return Request(PROMPTS[n % 3], Sampling(**({"max_tokens": 12} | sampling)), (0, n), stream_seed(7, (0, n)))


def engine(model, elsewhere=None, **kwargs):
    return TransformersEngine(model, stop_ids=[2], pad_id=0, elsewhere=elsewhere, **kwargs)


def play(made, count=6):
    async def together():
        return await asyncio.gather(*(made.generate(request(n)) for n in range(count)))

    return asyncio.run(together())


@pytest.fixture
def process():
    made = SamplerProcess()
    yield made
    made.close()


@pytest.mark.parametrize("deterministic", [True, False])
def test_one_child_samples_for_two_engines_what_they_would(process, deterministic):
    torch.set_num_threads(1)
    seeds = (1, 2)
    plain = [play(engine(models.model(seed=s))) for s in seeds]
    children = [engine(models.model(seed=s), process, deterministic=deterministic) for s in seeds]
    for made, expected in zip(children, plain, strict=True):
        assert play(made) == expected
    assert process.restarts == 0

    # a publish writes what the child reads
    source = dict(models.model(seed=3).named_parameters())
    asyncio.run(
        children[0].publish(1, lambda served: [tensor.copy_(source[name].data) for name, tensor in served.items()])
    )
    published = play(children[0])
    assert [s.version for s in published] == [1] * 6
    assert [s.logprobs for s in published] == [s.logprobs for s in play(engine(models.model(seed=3)))]
    assert play(children[1]) == plain[1]


def test_a_dead_child_is_replaced_with_the_current_weights(process, monkeypatch):
    monkeypatch.setattr(sampler_process, "RESTARTS", 1)
    made = engine(models.model(seed=1), process)
    expected = play(made)
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.join()
    with pytest.raises(EngineError, match="ended"):
        play(made)
    assert play(made) == expected
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.join()
    for message in ("ended", "has died 2 times"):
        with pytest.raises(EngineError, match=message):
            play(made)


def test_errors_come_back_and_the_child_goes_on(process):
    made = engine(models.model(seed=1), process)
    good = play(made)
    child = process._process
    with pytest.raises(TypeError):
        process._ask(0, [None])
    assert play(made) == good
    assert process._process is child
    asyncio.run(made.close())
    assert child.exitcode == 0
    assert process._process is None


def test_an_engine_that_closes_does_not_end_the_batch_of_another(process):
    one, other = (engine(models.model(seed=s), process, deterministic=False) for s in (1, 2))
    expected = play(engine(models.model(seed=2)), count=48)

    async def closing():
        asked = [asyncio.ensure_future(other.generate(request(n))) for n in range(48)]
        await asyncio.sleep(0.01)  # its batch is on its way
        await one.close()
        made = await asyncio.gather(*asked)
        child = process._process
        await other.close()
        return made, child

    play(one)
    made, child = asyncio.run(closing())
    assert made == expected
    assert child.exitcode == 0
    assert process._process is None
