"""A judge's engine on real vLLM: stop texts, and rubrics that are computed once."""

import dataclasses

import engines
import models
import pytest

from advgame.game.prompts import Templates
from advgame.game.tree import Rubric
from advgame.rollout.chat import ChatFormat, load_tokenizer
from advgame.rollout.engine import EngineError

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.bpe_folder(tmp_path_factory.mktemp("m") / "m", "llama", hidden=engines.HIDDEN)


@pytest.fixture(scope="module")
def judge(runner, folder):
    made = engines.vllm_engine(folder, name="judge", vllm=engines.settings(max_model_len=None), text_stops=True)
    runner.run(made.start())
    yield made
    runner.run(made.close())


def test_a_stop_text_ends_a_completion_at_the_token_that_completes_it(runner, judge, folder):
    decode = ChatFormat(load_tokenizer(folder, "judge.model")).text
    requests = [engines.request((3, 9, 10 + i), i, max_tokens=40) for i in range(6)]
    free = engines.play(runner, judge, requests)
    stopping, ends = [], []
    for request, sample in zip(requests, free, strict=True):
        # a few characters of the first ASCII stretch: they need not begin or end with a token
        text = "".join(c if c.isascii() and c.isprintable() else " " for c in decode(sample.token_ids[3:]))
        stop = max(text.split(), key=len)[-3:]
        ends.append(next(n for n in range(1, len(sample.token_ids) + 1) if stop in decode(sample.token_ids[:n])))
        stopping.append(dataclasses.replace(request, stop=("never there", stop)))
    for before, after, end in zip(free, engines.play(runner, judge, stopping), ends, strict=True):
        assert after.token_ids == before.token_ids[:end]
        assert len(after.logprobs) == end
        assert after.finish_reason == "stop"
    assert min(ends) < 35


def test_a_players_engine_refuses_stop_texts(runner, folder):
    engine = engines.vllm_engine(folder)
    with pytest.raises(EngineError, match="no tokenizer"):
        runner.run(engine.generate(dataclasses.replace(engines.request((3, 9)), stop=("x",))))
    with pytest.raises(EngineError, match="the prompt is empty"):
        runner.run(engine.generate(engines.request(())))
    assert engine.process_ids == [], "nothing need start to see that"


def test_a_rubric_is_computed_once(runner, judge, folder):
    chat, templates = ChatFormat(load_tokenizer(folder, "judge.model")), Templates.load()
    before = dict(judge.counters)
    prompts = [
        chat.prompt_ids(templates.pair(Rubric.DEFLECTION, f"question {i}", f"this {i}", f"that {i}")) for i in range(8)
    ]
    for i, prompt in enumerate(prompts):
        engines.play(runner, judge, [engines.request(prompt, i, max_tokens=2)])
    asked = judge.counters["judge_prompt_tokens"] - before.get("judge_prompt_tokens", 0)
    cached = judge.counters["judge_cached_tokens"] - before.get("judge_cached_tokens", 0)
    assert asked == sum(map(len, prompts))
    # seven of eight prompts find all of the rubric but its last, incomplete block
    assert 0.5 < cached / asked < 7 / 8
