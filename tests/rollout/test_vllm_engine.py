"""The vLLM engine on the CPU against plain forwards: log-probs, streams, limits, typed errors, death and restart."""

import asyncio
import os
import signal
import time

import engines
import models
import pytest
import torch

from advgame.rollout.engine import EngineDied, EngineError

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = [(3, 9, 10), (3, 9, 10, 11, 12, 13), (3, 14)]


@pytest.fixture(scope="module")
def model():
    return models.model(hidden=engines.HIDDEN, seed=1)


@pytest.fixture(scope="module")
def engine(runner, tmp_path_factory):
    made = engines.vllm_engine(engines.folder(tmp_path_factory.mktemp("m") / "m", seed=1))
    runner.run(made.start())
    yield made
    runner.run(made.close())


def test_logprobs_are_the_untempered_ones_of_a_plain_forward(runner, engine, model):
    requests = [engines.request(p, i, temperature=0.7, top_p=0.8) for i, p in enumerate(PROMPTS)]
    for sample in engines.play(runner, engine, requests):
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        expected = logps[rows, torch.tensor(sample.token_ids)]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=1e-4)
        assert sample.version == 0


def test_a_seeded_completion_does_not_depend_on_its_neighbours(runner, engine):
    requests = [engines.request(p, i) for i, p in enumerate(PROMPTS * 4)]
    together = engines.play(runner, engine, requests)
    alone = [engines.play(runner, engine, [r])[0] for r in requests]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]
    assert len({s.token_ids for s in together}) > 3


def test_greedy_is_transformers_greedy(runner, engine, model):
    (sample,) = engines.play(runner, engine, [engines.request(PROMPTS[1], temperature=0.0, max_tokens=24)])
    out = model.generate(torch.tensor([PROMPTS[1]]), do_sample=False, max_new_tokens=24, eos_token_id=2, pad_token_id=0)
    assert list(sample.token_ids) == out[0, len(PROMPTS[1]) :].tolist()


def test_each_request_has_its_own_limit_and_reason(runner, engine):
    limits = (1, 3, 200)
    requests = [engines.request(PROMPTS[0], i, max_tokens=limit) for i, limit in enumerate(limits)]
    for sample, limit in zip(engines.play(runner, engine, requests), limits, strict=True):
        assert len(sample.logprobs) == len(sample.token_ids) <= limit
        assert sample.finish_reason == ("stop" if sample.token_ids[-1] == 2 else "length")
        assert 2 not in sample.token_ids[:-1]


@pytest.mark.parametrize(
    ("prompt", "most", "says"),
    [((3,) * 300, 12, "256 positions"), ((3,) * 250, 12, "256 positions"), ((), 12, "empty"), ((3, 32), 12, "vocab")],
    ids=["too long", "too long with its answer", "empty", "unknown id"],
)
def test_what_cannot_be_served_is_an_engine_error_and_hurts_nobody(runner, engine, prompt, most, says):
    bad, good = engines.play(runner, engine, [engines.request(prompt, max_tokens=most), engines.request(PROMPTS[0], 1)])
    assert isinstance(bad, EngineError)
    assert not isinstance(bad, EngineDied)
    assert says in str(bad)
    assert good.token_ids


def test_an_engine_for_a_frozen_model_takes_no_weights(runner, engine):
    with pytest.raises(EngineError, match="frozen"):
        runner.run(engine.publish(1, lambda served: None))


def test_death_in_mid_generation_is_typed_and_the_engine_comes_back(runner, engine):
    (before,) = engines.play(runner, engine, [engines.request(PROMPTS[0])])
    pids = engine.process_ids

    async def kill_while_busy():
        busy = [
            asyncio.create_task(engine.generate(engines.request(PROMPTS[i % 3], i, max_tokens=200))) for i in range(64)
        ]
        await asyncio.sleep(0.05)
        start = time.perf_counter()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*busy, return_exceptions=True), time.perf_counter() - start

    answers, seconds = runner.run(kill_while_busy())
    died = [a for a in answers if isinstance(a, BaseException)]
    assert died
    assert all(isinstance(a, EngineDied) for a in died)
    assert seconds < 5
    (after,) = engines.play(runner, engine, [engines.request(PROMPTS[0])])
    assert after == before
    assert engine.counters["defender_restarts"] == 1
    assert engine.process_ids != pids
