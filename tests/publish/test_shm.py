"""Weights written into live vLLM engines on the CPU, proven by greedy tokens of transformers with the same weights."""

import engines
import models
import pytest
import torch

from advgame.publish.channels import AutoChannel, LoaderChannel, ShmChannel
from advgame.publish.plan import sources_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = [(3, 9, 10), (3, 9, 10, 11, 12, 13), (3, 14)]
LONG = 48


def writer(model):
    """A publish of this model's weights, as a learner would: by parameter name."""

    def write(served):
        parameters = dict(model.named_parameters())
        assert set(served) == set(parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                served[name].copy_(parameter)

    return write


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    return model.generate(ids, do_sample=False, max_new_tokens=LONG, eos_token_id=2, pad_token_id=0)[0, len(prompt) :]


def asked(runner, engine):
    return engines.play(
        runner, engine, [engines.request(p, i, temperature=0.0, max_tokens=LONG) for i, p in enumerate(PROMPTS)]
    )


def assert_serves(runner, engine, model, version):
    for prompt, sample in zip(PROMPTS, asked(runner, engine), strict=True):
        assert sample.version == version
        assert list(sample.token_ids) == greedy(model, prompt).tolist()
        ids = torch.tensor([[*prompt, *sample.token_ids]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        expected = logps[rows, torch.tensor(sample.token_ids)]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "tied"), [(family, tied) for family in ("qwen2", "llama", "qwen3") for tied in (True, False)], ids=str
)
def test_new_weights_are_what_is_sampled_from(runner, tmp_path, family, tied):
    first, second = (models.model(family, tied=tied, seed=s, hidden=engines.HIDDEN) for s in (0, 1))
    folder = engines.folder(tmp_path / "m", family, tied=tied, seed=0)
    channel = ShmChannel(family, sources_of(first.named_parameters()))
    engine = engines.vllm_engine(folder, channel=channel, vllm=engines.settings(verify_every=1))
    try:
        runner.run(engine.start())
        assert channel.staged == ()
        assert_serves(runner, engine, first, 0)
        for version, model in ((1, second), (2, first)):
            runner.run(engine.publish(version, writer(model)))
            assert_serves(runner, engine, model, version)
        # nothing may survive a zeroed engine but what the publish writes
        runner.run(engine._process.collective_rpc("advgame_zero"))
        assert asked(runner, engine)[0].token_ids != assert_tokens(first)
        runner.run(engine.publish(3, writer(second)))
        assert_serves(runner, engine, second, 3)
        assert engine.last_publish.total > 0
        assert not {k: v for k, v in engine.counters.items() if v and not k.endswith("_tokens")}
    finally:
        runner.run(engine.close())


def assert_tokens(model):
    return tuple(greedy(model, PROMPTS[0]).tolist())


def test_the_loader_serves_the_same(runner, tmp_path, monkeypatch):
    first, second = (models.model(seed=s, hidden=engines.HIDDEN) for s in (0, 1))
    channel = LoaderChannel(sources_of(first.named_parameters()), "float32")
    folder = engines.folder(tmp_path / "m", seed=0)
    engine = engines.vllm_engine(folder, channel=channel, vllm=engines.settings(verify_every=1))
    try:
        for version, model in ((1, second), (2, first)):
            runner.run(engine.publish(version, writer(model)))
            assert_serves(runner, engine, model, version)
        assert not engine.counters["defender_publish_failures"]
        # what was read is not what was written
        monkeypatch.setattr("advgame.publish.loader.checksums", lambda tensors: [1] * len(tensors))
        runner.run(engine.publish(3, writer(second)))
        assert engine.counters["defender_restarts"] == engine.counters["defender_publish_failures"] == 1
    finally:
        runner.run(engine.close())


def test_bfloat16_and_a_refused_plan_falls_back(runner, tmp_path):
    """A source too many cannot be placed: refused by name, and the loader says so in its own way."""
    first = models.model(seed=0, hidden=engines.HIDDEN)
    sources = sources_of(first.named_parameters())
    channel = AutoChannel("m", sources, "bfloat16")
    engine = engines.vllm_engine(engines.folder(tmp_path / "m", seed=0), channel=channel, dtype="bfloat16")
    try:
        runner.run(engine.start())
        assert channel.notes == ()
        assert all(t.dtype == torch.bfloat16 for t in channel.destinations.values())
        runner.run(engine.publish(1, writer(models.model(seed=1, hidden=engines.HIDDEN))))
        assert [s.version for s in asked(runner, engine)] == [1] * 3
    finally:
        runner.run(engine.close())


def test_two_workers_hold_their_slices(runner, tmp_path):
    """Tensor parallel on the CPU: every rank has a plan of its own, and sources are split over both."""
    first, second = (models.model(seed=s, hidden=engines.HIDDEN, tied=False) for s in (0, 1))
    channel = ShmChannel("m", sources_of(first.named_parameters()))
    vllm = engines.settings(tensor_parallel=2, verify_every=1)
    engine = engines.vllm_engine(engines.folder(tmp_path / "m", tied=False, seed=0), channel=channel, vllm=vllm)
    try:
        runner.run(engine.start())
        assert len(channel.plans) == 2
        assert "model.layers.0.self_attn.o_proj.weight" in channel.staged
        for version, model in ((1, second), (2, first)):
            runner.run(engine.publish(version, writer(model)))
            assert_serves(runner, engine, model, version)
    finally:
        runner.run(engine.close())
