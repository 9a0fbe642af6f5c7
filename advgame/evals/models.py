"""The models of an evaluation, named in one way everywhere and opened as speakers: text in, text out.

path/to/model            a Hugging Face folder, sampled by transformers in this process
path/to/run              a run of `advgame train`: the Defender of its newest checkpoint
path/to/run:step-000100  at another checkpoint
vllm:PATH                any of these, sampled by vLLM
http://host:8000/v1#name the model `name` of an OpenAI-compatible server; its settings may follow as
                         ?key=value&..., for example #name?api_key_env=KEY&concurrency=8
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import parse_qsl

import torch
from pydantic import Field, PositiveInt, ValidationError
from transformers import PreTrainedTokenizerBase

from advgame.errors import InputError
from advgame.evals.formats import TURN
from advgame.learn.load import load_model
from advgame.rollout import vllm_start
from advgame.rollout.chat import ChatFormat, load_tokenizer, stop_ids
from advgame.rollout.endpoint_engine import EndpointSpeaker, check_endpoint
from advgame.rollout.engine import Engine, EngineError, Sampling
from advgame.rollout.settings import EndpointSettings, Section, VllmSettings
from advgame.rollout.speaker import Asks, Speaker
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.rollout.vllm_engine import VllmEngine
from advgame.run.checkpoint_files import latest_checkpoint

Form = Literal["chat", "raw", "turns"]
"""How a text becomes a prompt: one user turn; as it stands, no template; turns parted by `formats.TURN`."""


class EngineSettings(Section):
    """How local models are sampled."""

    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Weights of local models (CPU: float32).")
    batch: PositiveInt = Field(64, description="Completions sampled at once by transformers.")
    retries: int = Field(2, ge=0, description="Retries of a failed engine call.")
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="vLLM engines.")


@dataclass(frozen=True)
class ModelSpec:
    """A named model, checked but not loaded: a folder, or an endpoint."""

    text: str
    field: str
    engine: Literal["transformers", "vllm", "endpoint"]
    folder: Path | None = None
    endpoint: EndpointSettings | None = None

    @property
    def name(self) -> str:
        """Short, for tables and file names; see `short_names` where it must be unique."""
        if self.endpoint is not None:
            return self.endpoint.model.replace("/", "_")
        assert self.folder is not None
        folder = self.folder
        if folder.parent.parent.name == "checkpoints":  # a player of a run
            return "_".join((folder.parent.parent.parent.name, folder.parent.name, folder.name))
        return folder.name

    def identity(self) -> str:
        """Tells weights apart: the server and its model's name, or a digest of the folder's weight files."""
        if self.endpoint is not None:
            return f"{self.endpoint.url}#{self.endpoint.model}"
        assert self.folder is not None
        return weights_digest(self.folder)


class Opened(Protocol):
    """A speaker with its width (questions worth having in flight) and its end."""

    @property
    def speaker(self) -> Asks: ...
    @property
    def width(self) -> int: ...
    async def close(self) -> None: ...


def parse_model(text: str, field: str, *, needs_template: bool = True) -> ModelSpec:
    """What `text` names. Loads no weights and sends nothing. Raises InputError naming `field`."""
    if text.startswith(("http://", "https://")):
        return _endpoint(text, field)
    engine: Literal["transformers", "vllm"] = "vllm" if text.startswith("vllm:") else "transformers"
    path = text.removeprefix("vllm:")
    folder = Path(path)
    run, colon, which = path.rpartition(":")
    if not folder.exists() and colon and (Path(run) / "config.yaml").is_file():
        folder = _player(Path(run), which, field)
    elif (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        folder = _player(folder, "", field)
    if not folder.exists():
        raise InputError(f"{field}: {path}: no such model folder; models are brought by the user, nothing is fetched")
    if needs_template:
        load_tokenizer(folder, field)
    if engine == "vllm":
        vllm_start.vllm_version(field)
        vllm_start.check_model(folder, field, VllmSettings())
    return ModelSpec(text, field, engine, folder)


def _player(run: Path, which: str, field: str) -> Path:
    """The Defender (its moving average, if there is one) of a run's checkpoint."""
    found = run / "checkpoints" / which if which else latest_checkpoint(run / "checkpoints").path
    if found is None or not found.is_dir():
        raise InputError(f"{field}: {run} has no intact checkpoint {which}".rstrip() + "; look into its checkpoints/")
    for name in ("defender-ema", "shared-ema", "defender", "shared"):
        if (found / name / "config.json").is_file():
            return found / name
    raise InputError(f"{field}: {found} holds no Defender, since none was trained; name the model folder itself")


def _endpoint(text: str, field: str) -> ModelSpec:
    url, mark, rest = text.partition("#")
    name, _, options = rest.partition("?")
    if not mark or not name:
        raise InputError(f"{field}: {text!r} names no model; write {url}#MODEL")
    try:
        settings = EndpointSettings.model_validate({"url": url, "model": name} | dict(parse_qsl(options)))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{field}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()} in {text!r}") from None
    check_endpoint(settings, field)
    return ModelSpec(text, field, "endpoint", endpoint=settings)


def weights_digest(folder: Path, sample: int = 1 << 20) -> str:
    """16 hex digits over names, sizes and both ends of the weight files, and config.json (blake2b)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(sample))
            file.seek(max(0, size - sample))
            digest.update(file.read(sample))
    return digest.hexdigest()


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


FORMS: dict[Form, type[ChatFormat]] = {"chat": ChatFormat, "raw": RawFormat, "turns": TurnsFormat}


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
    folder = spec.folder
    assert folder is not None
    tokenizer = load_tokenizer(folder, spec.field) if form != "raw" else raw_tokenizer(folder, spec.field)
    engine = await _engine(spec, folder, tokenizer, settings, name, counters)
    width = settings.vllm.max_sequences if spec.engine == "vllm" else settings.batch
    chat = FORMS[form](tokenizer)
    return LocalModel(Speaker(name, engine, chat, sampling, seed, settings.retries, counters=counters), engine, width)


def raw_tokenizer(folder: Path, field: str) -> PreTrainedTokenizerBase:
    """A tokenizer that need not have a chat template: a classifier is given its text as it stands."""
    try:
        return load_tokenizer(folder, field)
    except InputError as error:
        if "chat template" not in str(error):
            raise
    from transformers import AutoTokenizer

    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return found


async def _engine(
    spec: ModelSpec,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: EngineSettings,
    name: str,
    counters: Counter[str],
) -> Engine:
    stops = stop_ids(folder, tokenizer)
    on_gpu = torch.cuda.is_available()
    dtype = settings.dtype if on_gpu else "float32"
    if spec.engine == "vllm":
        engine: Engine = VllmEngine(
            folder, name=name, settings=settings.vllm, dtype=dtype, stop_ids=stops, channel=None, restore=None,
            counters=counters,
        )  # fmt: skip
    else:
        model = load_model(folder, spec.field, dtype=getattr(torch, dtype)).to("cuda" if on_gpu else "cpu")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        engine = TransformersEngine(model, stop_ids=stops, pad_id=pad, batch=settings.batch)
    try:
        await engine.start()
    except EngineError:
        await engine.close()
        raise
    return engine


def short_names(specs: list[ModelSpec]) -> list[str]:
    """A short name for each model, unique among them: the folder's name, with its parents' where needed."""
    names = [spec.name for spec in specs]
    for depth in range(1, 8):
        if len(set(names)) == len(names):
            break
        for i, spec in enumerate(specs):
            if names.count(names[i]) > 1 and spec.folder is not None:
                parts = spec.folder.resolve().parts
                names[i] = "_".join(parts[-1 - depth :])
    return [name if names[:i].count(name) == 0 else f"{name}.{i + 1}" for i, name in enumerate(names)]
