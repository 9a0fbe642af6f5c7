"""The sampler's log-probs stand for the reference: whatever it sampled with, and measured for each engine."""

import asyncio
from dataclasses import replace

import engines
import models
import pytest
import torch
from test_learner import gradients_of, learner

from advgame.game.pairs import Pair
from advgame.rollout.engine import Request, Sampling, stream_seed
from advgame.rollout.transformers_engine import TransformersEngine

PROMPTS = [(3, 9, 10, 11), (3, 12, 13), (3, 14, 15, 16, 17)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("player") / "m")


def sampled_pairs(generate, **sampling):
    """Two completions of each prompt, as a pair."""
    how = Sampling(**({"max_tokens": 16, "temperature": 0.6, "top_p": 0.9} | sampling))
    requests = [
        Request(prompt, how, (i, j), stream_seed(5, (i, j))) for i, prompt in enumerate(PROMPTS) for j in range(2)
    ]
    samples = generate(requests)
    return [Pair(a, b, 1.0, 0.0, "s") for a, b in zip(samples[::2], samples[1::2], strict=True)]


def embedded(model):
    async def together(requests):
        engine = TransformersEngine(model, stop_ids=[2], pad_id=0)
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    return lambda requests: asyncio.run(together(requests))


def moved(folder, **settings):
    """A learner whose average stands off its player, so that margins are not zero; and a model of that average."""
    made = learner(folder, **settings)
    generator = torch.Generator().manual_seed(3)
    for average in made.shadow.values():
        average += 0.02 * torch.randn(average.shape, generator=generator)
    sampler = models.model()
    sampler.load_state_dict(made.shadow, strict=False)
    return made, sampler


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 1.0}, {"temperature": 1.4, "top_p": 0.5}])
@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_gradients_on_the_samplers_numbers_are_the_recomputed_ones(folder, sampling, objective):
    ours, sampler = moved(folder, reference="rollout", objective=objective)
    theirs, _ = moved(folder, reference="recompute", objective=objective)
    made = sampled_pairs(embedded(sampler), **sampling)
    a, b = (gradients_of(one, lambda m: m.update_pairs(made, 0.0)) for one in (ours, theirs))
    for name, gradient in b.items():
        bound = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(a[name], gradient, atol=bound, rtol=1e-4, msg=name)


def test_auto_takes_raw_log_probs_and_leaves_tempered_ones(folder):
    auto, sampler = moved(folder, reference="auto", lr=1e-9)
    raw = sampled_pairs(embedded(sampler))
    tempered = [
        replace(p, **{side: tempered_sample(sampler, getattr(p, side), 0.6) for side in ("chosen", "rejected")})
        for p in raw
    ]
    other, _ = moved(folder, reference="auto", lr=1e-9)
    for _ in range(4):
        good, bad = auto.update_pairs(raw, 0.0), other.update_pairs(tempered, 0.0)
    assert (auto.reference.decided, other.reference.decided) == ("rollout", "recompute")
    assert good["reference_gap"] < 1e-4 < 0.1 < bad["reference_gap"]


def tempered_sample(model, sample, temperature):
    ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
    with torch.no_grad():
        logps = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    rows = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
    return replace(sample, logprobs=tuple(logps[rows, torch.tensor(sample.token_ids)].tolist()))


def test_the_gap_of_a_bfloat16_sampler_is_measured(folder):
    made, sampler = moved(folder, reference="auto", lr=1e-9)
    exact = made.update_pairs(sampled_pairs(embedded(sampler)), 0.0)["reference_gap"]
    rounded = made.update_pairs(sampled_pairs(embedded(sampler.bfloat16())), 0.0)["reference_gap"]
    assert exact < 1e-4
    assert 1e-3 < rounded < 1.0


@pytest.mark.slow
def test_vllms_numbers_stand_for_the_reference(tmp_path):
    pytest.importorskip("vllm")
    folder = engines.folder(tmp_path / "m", seed=0)
    auto = learner(folder, reference="auto", lr=1e-9)
    with asyncio.Runner() as runner:
        engine = engines.vllm_engine(folder)
        runner.run(engine.start())
        try:
            made = sampled_pairs(lambda requests: engines.play(runner, engine, requests))
        finally:
            runner.run(engine.close())
    for _ in range(4):
        values = auto.update_pairs(made, 0.0)
    assert values["reference_gap"] < 1e-3
    assert auto.reference.decided == "rollout"
