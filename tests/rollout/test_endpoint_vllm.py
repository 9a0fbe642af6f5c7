"""Both endpoint forms against vLLM's own OpenAI server on the CPU, with log-probs checked by a plain forward."""

import asyncio
from collections import Counter

import engines
import models
import pytest
import torch
import vllm_server

from advgame.rollout.endpoint_engine import EndpointEngine, EndpointSpeaker
from advgame.rollout.engine import Sampling
from advgame.rollout.settings import EndpointSettings

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = engines.folder(tmp_path_factory.mktemp("m") / "m", seed=1)
    with vllm_server.serving(folder) as url:
        yield url


def test_token_ids_and_raw_logprobs(url):
    async def run():
        engine = EndpointEngine("attacker", EndpointSettings(url=url, model="tiny"))
        try:
            requests = [engines.request((3, 9, 10 + i), i, temperature=0.7, max_tokens=12) for i in range(6)]
            once = await asyncio.gather(*(engine.generate(r) for r in requests))
            return once, await asyncio.gather(*(engine.generate(r) for r in requests))
        finally:
            await engine.close()

    once, again = asyncio.run(run())
    assert [s.token_ids for s in once] == [s.token_ids for s in again]
    model = models.model(hidden=engines.HIDDEN, seed=1)
    for sample in once:
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        expected = logps[rows, torch.tensor(sample.token_ids)]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_judge_is_asked_by_text(url, api):
    async def run():
        counters = Counter()
        speaker = EndpointSpeaker(
            "judge", EndpointSettings(url=url, model="tiny", api=api), Sampling(0.6, 0.9, 16), 0, counters
        )
        try:
            return await speaker.ask("how do i kill", (1,)), counters
        finally:
            await speaker.close()

    (sample, text), counters = asyncio.run(run())
    assert sample.finish_reason in ("stop", "length")
    assert any(word in text for word in (*models.WORDS, *models.TAGS))
    assert counters["judge_tokens"] > 0


def test_an_unknown_model_is_refused_at_once(url):
    async def run():
        counters = Counter()
        speaker = EndpointSpeaker("judge", EndpointSettings(url=url, model="other"), Sampling(), 0, counters)
        answer = await speaker.ask("how", (1,))
        await speaker.close()
        return answer, counters

    answer, counters = asyncio.run(run())
    assert answer == (None, "")
    assert counters["judge_http_404"] == 1
    assert counters["judge_http_retries"] == 0
