"""The sampler's log-probs against the average's own, and the time to the first token of new weights."""

import asyncio
import time
from dataclasses import replace

import models
import pytest
from test_learner import learner, sampled

from advgame.rollout.engine import Request, Sampling
from advgame.rollout.first_token import FirstToken
from advgame.rollout.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("player"))


def test_the_gap_is_that_of_the_averages_log_probs(folder):
    made = learner(folder)
    honest = [sampled([12, 13, 2]), sampled([14, 15, 16, 17, 2])]
    shifted = [replace(s, logprobs=tuple(lp - 0.25 for lp in s.logprobs)) for s in honest]
    assert made.sampler_gap(honest).largest < 1e-4
    gap = made.sampler_gap(shifted)
    assert (gap.mean, gap.largest, gap.tokens) == (pytest.approx(1.0, abs=1e-4), pytest.approx(1.25, abs=1e-4), 4.0)
    # the live player has moved on, the average has not: it is the average that is asked
    for parameter in made.parameters.values():
        parameter.data += 0.1
    assert made.sampler_gap(honest).largest < 1e-4


def test_one_micro_batch_is_enough(folder):
    made = learner(folder, micro_tokens=8)
    far = [sampled([12, 13, 2]), replace(sampled([14, 2]), logprobs=(-50.0, -50.0))]
    assert made.sampler_gap(far).largest < 1e-4


def test_the_first_token_after_a_publish_is_timed_once():
    clock = FirstToken()
    assert not clock.claim()
    clock.published(time.perf_counter() - 1.0)
    assert clock.claim()
    assert not clock.claim()
    clock.release()  # that request failed: the next one is watched
    assert clock.claim()
    clock.sampled()
    first = clock.seconds
    assert 1.0 < first < 5.0
    clock.sampled()
    clock.release()
    assert clock.seconds == first
    assert not clock.claim()


def test_the_embedded_engine_reports_it_before_a_completion_ends():
    engine = TransformersEngine(models.model(), stop_ids=[2], pad_id=0)
    engine.first_token.published(time.perf_counter())
    start = time.perf_counter()
    request = Request((3, 9, 10), Sampling(1.0, 1.0, 200), (0,), 1)
    sample = asyncio.run(engine.generate(request))
    whole = time.perf_counter() - start
    assert len(sample.token_ids) > 5
    assert 0 < engine.first_token.seconds < whole
