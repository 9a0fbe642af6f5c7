"""Real vLLM engines for tests: tiny models whose heads vLLM's CPU attention knows, and one event loop for a module."""

from __future__ import annotations

import asyncio
from pathlib import Path

import models

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
