"""Who samples in a run: the engine of every model, and the judge's speaker, as the settings name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from advgame.config import Config
from advgame.errors import InputError
from advgame.learn.load import load_model
from advgame.learn.trainer import Trainer
from advgame.rollout import vllm_start
from advgame.rollout.batch_sampler import check_samplable
from advgame.rollout.channel import Channel
from advgame.rollout.chat import ChatFormat, stop_ids
from advgame.rollout.endpoint_engine import EndpointSpeaker, check_endpoint
from advgame.rollout.engine import Engine, Sampling
from advgame.rollout.replicas import ReplicaEngine, Served
from advgame.rollout.sampler_process import SamplerProcess
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.rollout.vllm_engine import VllmEngine
from advgame.rollout.vllm_process import Launch, launch, launch_threaded

if TYPE_CHECKING:
    from advgame.cluster.ray_cluster import Cluster

LOOPBACK = "127.0.0.1"
"""`rollout.vllm.rendezvous_host` where nothing is said; on a cluster it stands for the trainer's own address there."""


def check_engines(config: Config, folders: Mapping[str, Path]) -> Cluster | None:
    """Settings of engines against this machine or the cluster and the model folders (by field name); loads nothing.

    Returns the reservation of a run on a cluster. Raises InputError: vLLM missing or of another version, a model it
    cannot serve, a bad endpoint, a cluster that is not there or too small.
    """
    if config.judge.endpoint is not None:
        check_endpoint(config.judge.endpoint, "judge.endpoint")
    players = config.rollout.engine == "vllm"
    judge = judge_engine(config) == "vllm"
    if players or judge:
        vllm_start.vllm_version("rollout.engine" if players else "judge.engine")
    elsewhere = config.cluster.placement == "ray"
    cluster = None
    if elsewhere:
        from advgame.cluster.ray_cluster import open_cluster

        cluster = open_cluster(config.cluster, replicas_of(config), config.rollout.vllm.tensor_parallel)
    elif players or judge:
        vllm_start.check_machine(config.rollout.vllm, publishes=players)
    cpu = vllm_start.on_cpu() if cluster is None else not cluster.gpus
    for field, folder in folders.items():
        if judge if field.startswith("judge.") else players:
            vllm_start.check_model(folder, field, config.rollout.vllm, cpu=cpu, elsewhere=elsewhere)
            if not field.startswith("judge."):
                vllm_start.check_player(folder, field)
    alone = config.learn.backend == "plain"  # else the ranks send, and rank 0 need not be one of them
    if cluster is not None and cluster.gpus and players and alone and vllm_start.on_cpu():
        raise InputError(
            "cluster.gpus: engines on GPUs get their weights over NCCL, and torch sees no GPU for the trainer here; "
            "start the run on a node with one"
        )
    return cluster


def replicas_of(config: Config) -> dict[str, int]:
    """How many engines each vLLM model of a run has, by the engine's name."""
    named: list[str] = []
    if config.rollout.engine == "vllm":
        named = ["shared"] if config.game.self_play else ["attacker", "defender"][int(config.game.skip_attacker) :]
    if judge_engine(config) == "vllm":
        named = [*named, "judge"]
    return {name: config.rollout.vllm.replicas_of(name) for name in named}


def devices_of(config: Config) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of the engines that have their own, those of replicas together."""
    placed = config.rollout.vllm.devices.items() if config.rollout.engine == "vllm" else ()
    return {name: devices if isinstance(devices, str) else ",".join(devices) for name, devices in placed}


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
    cluster: Cluster | None = None,
) -> Engine:
    """The engine of one model; `learner` is who publishes to it, None for a frozen one. vLLM starts with `start`.

    elsewhere: a child process in which a transformers engine samples. cluster: where vLLM's engines are placed.
    The judge's (`name`) can stop at a text.
    """
    stops = stop_ids(folder, tokenizer)
    if kind == "vllm":
        if learner is not None and learner.senders is not None and not _by_ranks(config, cluster):
            learner.notes.append(
                f"{name}: its weights are gathered on rank 0 before they reach an engine; set rollout.vllm.transport: "
                "collective to have every rank send its own shard"
            )
        count = config.rollout.vllm.replicas_of(name)
        replicas = [
            VllmEngine(
                folder,
                name=name,
                settings=config.rollout.vllm,
                dtype=config.rollout.dtype,
                stop_ids=stops,
                channel=None if learner is None else open_channel(config, folder, learner, cluster, number),
                restore=None if learner is None else learner.serve_into,
                counters=counters,
                text_stops=name == "judge",
                replica=number,
                launch=launch_of(name, number, count, cluster),
            )
            for number in range(count)
        ]
        return replicas[0] if count == 1 else ReplicaEngine(replicas)
    model = load_model(folder, field, dtype=getattr(torch, config.rollout.dtype), remote_code=config.trust_remote_code)
    check_samplable(model, field)
    return TransformersEngine(
        model.to(device),
        stop_ids=stops,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        batch=config.rollout.batch,
        deterministic=config.run.deterministic,
        elsewhere=elsewhere,
        decode=ChatFormat(tokenizer).text,
    )


def launch_of(name: str, number: int, count: int, cluster: Cluster | None) -> Launch:
    """Where replica `number` of `count` runs; beside others in a thread, so that its start does not hold them up."""
    if cluster is not None:
        return cluster.launch(name, number)
    return launch if count == 1 else launch_threaded


def _by_ranks(config: Config, cluster: Cluster | None) -> bool:
    """Whether the ranks of a sharded player send it themselves."""
    return cluster is not None or config.rollout.vllm.transport == "collective"


def open_channel(
    config: Config, folder: Path, learner: Trainer, cluster: Cluster | None = None, replica: int = 0
) -> Channel:
    """The way of a player's weights to one engine, by `rollout.vllm.transport` and who holds them."""
    from advgame.publish.channels import AutoChannel, IpcChannel, LoaderChannel, ShmChannel
    from advgame.publish.collective import CollectiveChannel
    from advgame.publish.plan import sources_of
    from advgame.publish.sharded import ShardsChannel

    parameters = learner.published
    sources, settings = sources_of(parameters.items()), config.rollout.vllm
    device = next(iter(parameters.values())).device
    if cluster is not None and settings.rendezvous_host == LOOPBACK:
        settings = settings.model_copy(update={"rendezvous_host": cluster.host})
    if learner.senders is not None and _by_ranks(config, cluster):
        return ShardsChannel(folder.name, sources, learner.senders, settings, str(replica))
    if cluster is not None:
        return CollectiveChannel(folder.name, sources, device, settings)
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
    started = [engine for engine in engines if isinstance(engine, Served)]
    if started and config.run.deterministic:
        notes.append("run.deterministic: vLLM batches requests as they come; this run does not repeat bit for bit")
    notes += [f"{engine.name}: {note}" for engine in started for note in engine.notes]
    return notes
