"""The models of an evaluation (see `named.py`), opened as speakers: text in, text out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, PositiveInt
from transformers import PreTrainedTokenizerBase

from advgame.errors import InputError
from advgame.evals.formats import TURN
from advgame.evals.named import ModelSpec
from advgame.game.prompts import Templates
from advgame.learn.load import load_model
from advgame.rollout.batch_sampler import check_samplable
from advgame.rollout.chat import ChatFormat, load_tokenizer, stop_ids
from advgame.rollout.endpoint_engine import EndpointSpeaker
from advgame.rollout.engine import Engine, EngineError, Sampling
from advgame.rollout.settings import Section, VllmSettings
from advgame.rollout.speaker import Asks, Speaker
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.rollout.vllm_engine import VllmEngine

Form = Literal["chat", "raw", "turns"]
"""How a text becomes a prompt: one user turn; as it stands, no template; turns parted by `formats.TURN`."""


class EngineSettings(Section):
    """How local models are sampled."""

    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Weights of local models (CPU: float32).")
    batch: PositiveInt = Field(64, description="Completions sampled at once by transformers.")
    retries: int = Field(2, ge=0, description="Retries of a failed engine call.")
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="vLLM engines.")


class Opened(Protocol):
    """A speaker with its width (questions worth having in flight) and its end."""

    @property
    def speaker(self) -> Asks: ...
    @property
    def width(self) -> int: ...
    async def close(self) -> None: ...


class RawFormat(ChatFormat):
    """A text as it stands, without a chat template; the opening token is added unless the text spells it."""

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        begins = str(self.tokenizer.bos_token or "")
        spelt = bool(begins) and user.startswith(begins)
        return tuple(self.tokenizer(user, add_special_tokens=not spelt)["input_ids"])


class TurnsFormat(ChatFormat):
    """User and assistant by turns, parted by `formats.TURN`, and the opening of the model's own answer."""

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        roles = ("user", "assistant")
        for token in self._special:
            user = user.replace(token, f"{token[0]} {token[1:]}")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(user.split(TURN))]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class TurnsSpeaker(EndpointSpeaker):
    """As `TurnsFormat`, by way of the server's own template."""

    def messages(self, user: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(user.split(TURN))]


class DefenderFormat(ChatFormat):
    """Asks a run's Defender as it was trained: within the instruction to reason first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, templates: Templates):
        super().__init__(tokenizer)
        self._templates = templates

    def conversation_ids(self, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        *before, (role, text) = turns
        return super().conversation_ids([*before, (role, self._templates.defender(text))])


def chat_format(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """How a local model is asked: by its own chat template, and see `DefenderFormat`."""
    if not spec.reasons:
        return ChatFormat(tokenizer)
    from advgame.run.check import load_templates

    assert spec.config is not None, "only a run's player reasons so"
    world = spec.world
    return DefenderFormat(tokenizer, load_templates(spec.config, None if world is None else world.templates_dir))


FORMS: dict[Form, type[ChatFormat]] = {"raw": RawFormat, "turns": TurnsFormat}


@dataclass
class LocalModel:
    """An engine in this machine."""

    speaker: Asks
    engine: Engine
    width: int

    async def close(self) -> None:
        await self.engine.close()


@dataclass
class RemoteModel:
    """A server."""

    speaker: EndpointSpeaker
    width: int

    async def close(self) -> None:
        await self.speaker.close()


async def open_model(
    spec: ModelSpec,
    sampling: Sampling,
    settings: EngineSettings,
    *,
    name: str,
    seed: int,
    counters: Counter[str],
    form: Form = "chat",
) -> Opened:
    """Loads the model, or asks the server one short question. Raises InputError or EngineError with one line."""
    if spec.endpoint is not None:
        endpoint = spec.endpoint if form != "raw" else spec.endpoint.model_copy(update={"api": "completions"})
        maker = TurnsSpeaker if form == "turns" else EndpointSpeaker
        speaker = maker(name, endpoint, sampling, seed, counters)
        sample, _ = await speaker.ask("Hello", (0,), Sampling(0.0, 1.0, 1))
        if sample is None:
            await speaker.close()
            raise InputError(f"{spec.field}: {speaker.last_error or endpoint.url}; check address, model name and key")
        return RemoteModel(speaker, endpoint.concurrency)
    folder = spec.model_folder()
    tokenizer = load_tokenizer(folder, spec.field) if form != "raw" else raw_tokenizer(folder, spec.field)
    dtype = settings.dtype if torch.cuda.is_available() else "float32"
    engine = await open_engine(
        spec, folder, tokenizer, name=name, dtype=dtype, vllm=settings.vllm, counters=counters, batch=settings.batch
    )
    width = settings.vllm.max_sequences if spec.engine == "vllm" else settings.batch
    chat = chat_format(spec, tokenizer) if form == "chat" else FORMS[form](tokenizer)
    return LocalModel(Speaker(name, engine, chat, sampling, seed, settings.retries, counters=counters), engine, width)


def raw_tokenizer(folder: Path, field: str) -> PreTrainedTokenizerBase:
    """A tokenizer that need not have a chat template: a classifier is given its text as it stands."""
    try:
        return load_tokenizer(folder, field)
    except InputError as error:
        if "chat template" not in str(error):
            raise
    from transformers import AutoTokenizer

    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return found


async def open_engine(
    spec: ModelSpec,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    dtype: str,
    vllm: VllmSettings,
    counters: Counter[str],
    **embedded: Any,
) -> Engine:
    """The running engine of a model folder, on the GPU if there is one. `embedded`: what a TransformersEngine may be
    told besides. Raises InputError or EngineError, and leaves no engine then."""
    stops = stop_ids(folder, tokenizer)
    if spec.engine == "vllm":
        engine: Engine = VllmEngine(
            folder, name=name, settings=vllm, dtype=dtype, stop_ids=stops, channel=None, restore=None, counters=counters
        )
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(folder, spec.field, dtype=getattr(torch, dtype)).to(device)
        check_samplable(model, spec.field)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        engine = TransformersEngine(model, stop_ids=stops, pad_id=pad, **embedded)
    try:
        await engine.start()
    except EngineError:
        await engine.close()
        raise
    return engine
