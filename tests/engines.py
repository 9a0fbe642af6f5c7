"""Real vLLM engines for tests: tiny models whose heads vLLM's CPU attention knows, and one event loop for a module."""

from __future__ import annotations

import asyncio
from pathlib import Path

import models
import torch

from advgame.rollout.engine import Request, Sampling, stream_seed
from advgame.rollout.settings import VllmSettings
from advgame.rollout.vllm_engine import VllmEngine

HIDDEN = 128
"""Four heads of size 32."""


def settings(**changes) -> VllmSettings:
    return VllmSettings(**({"max_model_len": 256, "cache_gib": 0.25, "publish_timeout_s": 20.0} | changes))


def vllm_engine(folder: Path, *, name: str = "defender", vllm=None, **kwargs) -> VllmEngine:
    return VllmEngine(
        folder, name=name, settings=vllm or settings(), dtype=kwargs.pop("dtype", "float32"), stop_ids=[2], **kwargs
    )


def request(prompt, n=0, **sampling) -> Request:
    return Request(tuple(prompt), Sampling(**({"max_tokens": 12} | sampling)), (0, n), stream_seed(7, (0, n)))


def folder(path: Path, family: str = "qwen2", **kwargs) -> Path:
    return models.folder(path, family, hidden=HIDDEN, **kwargs)


def play(runner: asyncio.Runner, engine, requests):
    async def together():
        return await asyncio.gather(*(engine.generate(r) for r in requests), return_exceptions=True)

    return runner.run(together())


class Weights:
    """Two models that take turns as the average."""

    def __init__(self):
        self.models = [models.model(seed=s, hidden=HIDDEN) for s in (0, 1)]
        self.moves = 0

    @property
    def now(self):
        return self.models[self.moves % 2]

    def write(self, served):
        self.moves += 1
        self.restore(served)

    def restore(self, served):
        with torch.no_grad():
            for name, parameter in self.now.named_parameters():
                served[name].copy_(parameter)


def assert_serves(runner, engine, weights, prompts=((3, 9, 10),)):
    """What the engine samples has its version, and the log-probs of `weights.now`."""
    for sample in play(runner, engine, [request(p, i, max_tokens=48) for i, p in enumerate(prompts)]):
        assert sample.version == engine.version
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        with torch.no_grad():
            logps = weights.now(input_ids=ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
        expected = logps[rows, torch.tensor(sample.token_ids)]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=1e-4)


async def until(condition, seconds=5.0, pause=0.001):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(pause)


def everybody_up(runner, engine):
    """Waits for all replicas."""
    runner.run(until(lambda: all(seat.up for seat in engine._seats), 120, 0.05))


def running(pid):
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
