"""Who samples in a run: the engine of every model, and the judge's speaker, as the settings name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from advgame.config import Config
from advgame.learn.load import load_model
from advgame.learn.trainer import Trainer
from advgame.rollout import vllm_start
from advgame.rollout.channel import Channel
from advgame.rollout.chat import ChatFormat, stop_ids
from advgame.rollout.endpoint_engine import EndpointSpeaker, check_endpoint
from advgame.rollout.engine import Engine, Sampling
from advgame.rollout.sampler_process import SamplerProcess
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.rollout.vllm_engine import VllmEngine


def check_engines(config: Config, folders: Mapping[str, Path]) -> None:
    """Settings of engines against this machine and the model folders (by field name); loads and sends nothing.

    Raises InputError: vLLM missing or of another version, a model it cannot serve, a bad endpoint.
    """
    if config.judge.endpoint is not None:
        check_endpoint(config.judge.endpoint, "judge.endpoint")
    players = config.rollout.engine == "vllm"
    judge = judge_engine(config) == "vllm"
    if players or judge:
        vllm_start.vllm_version("rollout.engine" if players else "judge.engine")
        vllm_start.check_machine(config.rollout.vllm, publishes=players)
    for field, folder in folders.items():
        if judge if field.startswith("judge.") else players:
            vllm_start.check_model(folder, field, config.rollout.vllm)
            if not field.startswith("judge."):
                vllm_start.check_player(folder, field)


def judge_engine(config: Config) -> str | None:
    """What an llm judge is sampled by; None for other judges."""
    if config.judge.kind != "llm":
        return None
    if config.judge.endpoint is not None:
        return "endpoint"
    return config.judge.engine or config.rollout.engine


def open_engine(
    config: Config,
    kind: str,
    folder: Path,
    *,
    name: str,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    learner: Trainer | None,
    counters: Counter[str],
    device: torch.device,
    elsewhere: SamplerProcess | None = None,
) -> Engine:
    """The engine of one model; `learner` is who publishes to it, None for a frozen one. vLLM starts with `start`.

    elsewhere: a child process in which a transformers engine samples.
    The judge's (`name`) can stop at a text.
    """
    stops = stop_ids(folder, tokenizer)
    if kind == "vllm":
        return VllmEngine(
            folder,
            name=name,
            settings=config.rollout.vllm,
            dtype=config.rollout.dtype,
            stop_ids=stops,
            channel=None if learner is None else open_channel(config, folder, learner.published),
            restore=None if learner is None else learner.serve_into,
            counters=counters,
            text_stops=name == "judge",
        )
    model = load_model(folder, field, dtype=getattr(torch, config.rollout.dtype), remote_code=config.trust_remote_code)
    return TransformersEngine(
        model.to(device),
        stop_ids=stops,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        batch=config.rollout.batch,
        deterministic=config.run.deterministic,
        elsewhere=elsewhere,
        decode=ChatFormat(tokenizer).text,
    )


def open_channel(config: Config, folder: Path, parameters: Mapping[str, Tensor]) -> Channel:
    """The way of weights by `rollout.vllm.transport`."""
    from advgame.publish.channels import AutoChannel, IpcChannel, LoaderChannel, ShmChannel
    from advgame.publish.collective import CollectiveChannel
    from advgame.publish.plan import sources_of

    sources, settings = sources_of(parameters.items()), config.rollout.vllm
    device = next(iter(parameters.values())).device
    if settings.transport == "loader":
        return LoaderChannel(sources, config.rollout.dtype)
    if settings.transport == "collective":
        return CollectiveChannel(folder.name, sources, device, settings)
    arena = ShmChannel(folder.name, sources) if vllm_start.on_cpu() else IpcChannel(folder.name, sources, device)
    return AutoChannel(folder.name, sources, config.rollout.dtype, arena) if settings.transport == "auto" else arena


def open_endpoint_speaker(config: Config, counters: Counter[str]) -> EndpointSpeaker:
    """The speaker of a judge behind a server."""
    endpoint, sampling = config.judge.endpoint, config.judge.sampling
    assert endpoint is not None, "checked by the config"
    how = Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens)
    return EndpointSpeaker("judge", endpoint, how, config.run.seed, counters)


def notes_of(config: Config, engines: Sequence[Engine]) -> list[str]:
    """What a user should know of this run's engines, one line each; after their start."""
    notes = []
    if config.judge.endpoint is not None:
        host = check_endpoint(config.judge.endpoint, "judge.endpoint")
        notes.append(f"egress: the judge's questions go to {host} (judge.endpoint), and nowhere else")
    started = [engine for engine in engines if isinstance(engine, VllmEngine)]
    if started and config.run.deterministic:
        notes.append("run.deterministic: vLLM batches requests as they come; this run does not repeat bit for bit")
    notes += [f"{engine.name}: {note}" for engine in started for note in engine.notes]
    return notes
