"""The embedded engine against plain forwards: log-probs, random streams, limits, batches, publishing."""

import asyncio
import dataclasses

import models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from advgame.errors import InputError
from advgame.rollout.batch_sampler import check_samplable, nucleus
from advgame.rollout.chat import ChatFormat, load_tokenizer
from advgame.rollout.engine import EngineError, Request, Sampling, stream_seed
from advgame.rollout.transformers_engine import TransformersEngine

PROMPTS = [(3, 9, 10), (3, 9, 10, 11, 12, 13), (3, 14)]


def engine(model=None, **kwargs):
    return TransformersEngine(model or models.model(), stop_ids=[2], pad_id=0, **kwargs)


def request(prompt, n, **sampling):
    return Request(prompt, Sampling(**({"max_tokens": 12} | sampling)), (0, n), stream_seed(7, (0, n)))


def play(made, requests):
    async def together():
        return await asyncio.gather(*(made.generate(r) for r in requests))

    return asyncio.run(together())


def test_logprobs_are_the_untempered_ones_of_a_plain_forward():
    model = models.model(seed=1)
    requests = [request(p, i, temperature=0.7, top_p=0.8) for i, p in enumerate(PROMPTS)]
    for sample in play(engine(model), requests):
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        expected = logps[rows, torch.tensor(sample.token_ids)]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_a_folders_generation_config_does_not_shape_sampling():
    plain, penalised = models.model(seed=1), models.model(seed=1)
    penalised.generation_config.repetition_penalty = 1.7
    penalised.generation_config.top_k = 3
    requests = [request(p, i) for i, p in enumerate(PROMPTS)]
    assert play(engine(plain), requests) == play(engine(penalised), requests)


def test_any_failure_reaches_whoever_waits(monkeypatch):
    made = engine()
    for error, expected in ((TypeError("a bug"), TypeError), (RuntimeError("memory"), EngineError)):
        monkeypatch.setattr(made, "_sample", lambda requests, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(expected):
            play(made, [request(PROMPTS[0], 0)])


def test_a_completion_does_not_depend_on_its_neighbours():
    model = models.model()
    requests = [request(p, i) for i, p in enumerate(PROMPTS)]
    together = play(engine(model), requests)
    alone = [play(engine(model), [r])[0] for r in requests]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]


def test_batches_are_formed_by_key_whatever_the_arrival():
    model = models.model()
    requests = [request(p, i) for i, p in enumerate(PROMPTS * 3)]
    forward = play(engine(model, batch=4), requests)
    backward = play(engine(model, batch=4), requests[::-1])[::-1]
    assert forward == backward


def test_worker_threads_sample_the_same():
    model = models.model()
    requests = [request(p, i) for i, p in enumerate(PROMPTS)]
    assert [s.token_ids for s in play(engine(model), requests)] == [
        s.token_ids for s in play(engine(model, deterministic=False), requests)
    ]


def test_each_row_has_its_own_limit_and_reason():
    requests = [request(PROMPTS[0], i, max_tokens=limit) for i, limit in enumerate((1, 3, 200))]
    samples = play(engine(), requests)
    for sample, limit in zip(samples, (1, 3, 200), strict=True):
        assert len(sample.token_ids) <= limit
        assert len(sample.logprobs) == len(sample.token_ids)
        assert sample.finish_reason == ("stop" if sample.token_ids[-1] == 2 else "length")
        assert 2 not in sample.token_ids[:-1]


@pytest.mark.parametrize("family", [*models.FAMILIES, "gpt_oss", "qwen3_next", "bloom"])
def test_greedy_is_transformers_greedy(family):
    """Of prompts that come several times, in rows that leave the batch one after the other."""
    model = models.model(family, seed=3)
    asked = [(PROMPTS[i % 3], limit) for i, limit in enumerate((12, 1, 3, 20, 5, 2, 12, 7, 9, 30))]
    requests = [request(prompt, i, temperature=0.0, max_tokens=limit) for i, (prompt, limit) in enumerate(asked)]
    samples = play(engine(model), requests)
    assert len({len(sample.token_ids) for sample in samples}) > 4
    for (prompt, limit), sample in zip(asked, samples, strict=True):
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=limit, eos_token_id=2, pad_token_id=0
        )
        assert list(sample.token_ids) == out[0, len(prompt) :].tolist()


def test_a_model_without_a_cache_is_refused():
    config = AutoConfig.for_model("mamba", vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="MambaForCausalLM has no key-value cache"):
        check_samplable(AutoModelForCausalLM.from_config(config), "judge.model")


def test_an_ended_row_needs_no_positions_beyond_the_models():
    """It ends long before the eleven others."""
    model = models.model("gpt2", seed=3)
    long = tuple(3 + i % 20 for i in range(4090))
    requests = [request(long, 0, max_tokens=6), *(request(PROMPTS[0], i, max_tokens=60) for i in range(1, 12))]
    samples = play(TransformersEngine(model, stop_ids=[99], pad_id=0), requests)
    assert [len(sample.token_ids) for sample in samples] == [6] + [60] * 11


def test_first_tokens_follow_the_tempered_distribution():
    model = models.model(seed=2)
    count, temperature = 4000, 1.3
    samples = play(
        engine(model, batch=count),
        [request(PROMPTS[0], i, temperature=temperature, max_tokens=1) for i in range(count)],
    )
    drawn = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=32) / count
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    # five standard deviations of a frequency
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-4).all()


def test_nucleus_keeps_the_smallest_set_that_holds_the_mass():
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.1, 0.5, 0.15, 0.25], [1.0, 0.0, 0.0, 0.0]])
    kept = nucleus(probs, torch.tensor([[0.7], [1.0], [0.1]]))
    assert (kept > 0).tolist() == [[False, True, False, True], [True] * 4, [True, False, False, False]]


def bpe(tmp_path, seed=4):
    folder = models.bpe_folder(tmp_path / "m", "llama")
    tokenizer = load_tokenizer(folder, "judge.model")
    return models.model("llama", vocab=400, seed=seed), ChatFormat(tokenizer).text


def test_a_stop_text_ends_the_row_at_the_token_that_completes_it(tmp_path):
    model, decode = bpe(tmp_path)
    made = engine(model, decode=decode)
    free = play(made, [request(PROMPTS[i % 3], i, max_tokens=40) for i in range(6)])
    requests, ends = [], []
    for i, sample in enumerate(free):
        text = decode(sample.token_ids)
        stop = text[len(text) // 2 : len(text) // 2 + 3]  # need not begin or end with a token
        assert stop.strip() == stop
        ends.append(next(n for n in range(1, 41) if stop in decode(sample.token_ids[:n])))
        requests.append(dataclasses.replace(request(PROMPTS[i % 3], i, max_tokens=40), stop=("never there", stop)))
    stopped = play(made, requests)
    assert len(set(ends)) > 2
    for before, after, end in zip(free, stopped, ends, strict=True):
        assert after.token_ids == before.token_ids[:end]
        assert after.logprobs == pytest.approx(before.logprobs[:end], abs=1e-4)
        assert after.finish_reason == "stop"
    short = [
        dataclasses.replace(r, sampling=Sampling(max_tokens=end - 1)) for r, end in zip(requests, ends, strict=True)
    ]
    assert {s.finish_reason for s in play(made, short)} == {"length"}


def test_a_stop_text_needs_a_tokenizer():
    with pytest.raises(EngineError, match="no tokenizer"):
        play(engine(), [dataclasses.replace(request(PROMPTS[0], 0), stop=("x",))])


def test_publish_writes_in_place_and_stamps():
    made, other = engine(models.model(seed=0)), models.model(seed=5)
    before = play(made, [request(PROMPTS[0], 0, temperature=0.0)])[0]

    def write(served):
        for name, parameter in other.named_parameters():
            served[name].copy_(parameter)

    asyncio.run(made.publish(4, write))
    after = play(made, [request(PROMPTS[0], 0, temperature=0.0)])[0]
    assert (before.version, after.version) == (0, 4)
    (own,) = play(engine(other), [request(PROMPTS[0], 0, temperature=0.0)])
    assert after.token_ids == own.token_ids


def test_a_request_beyond_the_models_positions_is_an_engine_error():
    with pytest.raises(EngineError, match="4096 positions"):
        play(engine(), [request(PROMPTS[0], 0, max_tokens=5000)])


def test_streams_differ_by_key_and_seed_and_repeat():
    seeds = {stream_seed(s, (0, i)) for s in range(3) for i in range(50)}
    assert len(seeds) == 150
    assert stream_seed(1, (2, 3)) == stream_seed(1, (2, 3))
    assert all(0 <= s < 2**63 for s in seeds)
