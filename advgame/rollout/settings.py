"""The settings of sampling, validated where the config tree includes them:
`rollout:`, `judge.endpoint:` and every `sampling:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from advgame.settings import Section

Share = Annotated[float, Field(gt=0, le=1)]


class SamplingSettings(Section):
    temperature: NonNegativeFloat = Field(0.6, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus mass.")
    max_tokens: PositiveInt = Field(2048, description="Longest completion, closing token included.")


EngineName = Literal["attacker", "defender", "shared", "judge"]


class VllmSettings(Section):
    """How vLLM engines start, and how new weights reach them."""

    replicas: dict[EngineName, PositiveInt] = Field(
        {}, description="Engines of the same model, for example {defender: 2, judge: 6}; one where nothing is said."
    )

    tensor_parallel: PositiveInt = Field(1, description="GPUs (or CPU workers) that share one engine's model.")
    memory_share: Share = Field(
        0.9, description="Share of a GPU's memory for an engine's weights and cache; lower it where models share a GPU."
    )
    cache_gib: PositiveFloat | None = Field(
        None, description="Key-value cache in GiB; null: 1 on the CPU, what memory_share leaves on a GPU."
    )
    max_model_len: PositiveInt | None = Field(None, description="Longest prompt + completion; null: the model's own.")
    max_sequences: PositiveInt = Field(256, description="Most completions decoded at once.")
    prefix_caching: bool = Field(True, description="Keep the computed prefixes of prompts (a judge's rubric).")
    eager: bool | None = Field(None, description="Skip compilation and decode graphs; null: on the CPU only.")
    devices: dict[EngineName, str | list[str]] = Field(
        {},
        description="CUDA_VISIBLE_DEVICES of engines, a list for replicas: {attacker: '0', defender: ['1', '2']}; one "
        "entry for several replicas is shared by them.",
    )
    threads: PositiveInt = Field(1, description="OpenMP threads of an engine on the CPU.")
    transport: Literal["auto", "shm", "ipc", "collective", "loader"] = Field(
        "auto",
        description="How weights arrive. shm (CPU) and ipc (GPUs of this node): written where the engine reads; "
        "collective: broadcast in buckets (other nodes; NCCL, gloo); loader: vLLM's own, slower; auto: shm or ipc, and "
        "the loader with a warning for models whose copy plan is refused.",
    )
    rendezvous_host: str = Field(
        "127.0.0.1", description="collective: address of the trainer's node as the engines' nodes see it."
    )
    rendezvous_port: int = Field(0, ge=0, le=65535, description="collective: port of the trainer; 0: any free one.")
    bucket_mib: PositiveInt = Field(256, description="collective: size of a bucket in MiB, held once on each side.")
    in_flight: Literal["finish", "keep", "abort"] = Field(
        "finish", description="Requests in flight when weights arrive: finish, continue on the new weights, or retry."
    )
    verify_every: int = Field(
        50, ge=0, description="Publishes between checks of all weights and of the sampler's log-probs; 0: never."
    )
    sampler_gap: PositiveFloat | None = Field(
        None,
        description="Most nats that the sampler's log-probs of 64 tokens may differ from the average's own, in the "
        "mean; null: 0.02 where all is float32, else 1.",
    )
    start_timeout_s: PositiveFloat = Field(600.0, description="Longest start of an engine.")
    request_timeout_s: PositiveFloat = Field(1800.0, description="Longest wait for one completion.")
    publish_timeout_s: PositiveFloat = Field(60.0, description="Longest wait for each part of a publish.")
    breaker: int = Field(
        3, ge=0, description="Timeouts or unusable answers in a row after which an engine is restarted; 0: never."
    )
    restarts: int = Field(
        3, ge=0, description="Restarts of a dead engine before it is given up; without engines a run ends."
    )

    def replicas_of(self, name: str) -> int:
        counts: Mapping[Any, int] = self.replicas
        return counts.get(name, 1)

    def device_of(self, name: str, replica: int = 0) -> str | None:
        """CUDA_VISIBLE_DEVICES of one engine; None: whatever this process has."""
        devices: Mapping[Any, str | list[str]] = self.devices
        placed = devices.get(name)
        return placed[replica] if isinstance(placed, list) else placed


class EndpointSettings(Section):
    """An OpenAI-compatible server. Its host is printed and recorded."""

    url: str = Field(description="Base address, for example http://127.0.0.1:8000/v1.")
    model: str = Field(description="Model name that the server expects.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: text through /chat/completions; completions: text through /completions, no template."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the API key (never the key itself); null: no key."
    )
    timeout_s: PositiveFloat = Field(120.0, description="Longest wait for one answer.")
    retries: int = Field(4, ge=0, description="Retries after 429, 5xx, a broken connection or a timeout.")
    backoff_s: NonNegativeFloat = Field(0.5, description="First wait before a retry; doubles, Retry-After is obeyed.")
    concurrency: PositiveInt = Field(32, description="Most requests at once.")
    rpm: PositiveFloat | None = Field(None, description="Most requests a minute, evenly spaced; null: no limit.")


class RolloutSettings(Section):
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="Who samples: Hugging Face models in this process, or vLLM."
    )
    source: Literal["ema", "live"] = Field("ema", description="Weights that sample: the EMA, or the live player.")
    batch: PositiveInt = Field(256, description="Most completions in one engine batch (transformers).")
    in_flight: PositiveInt = Field(1024, description="Most trees played at once.")
    retries: int = Field(2, ge=0, description="Retries of a failed engine call.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Weights of the engines.")
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="vLLM engines.")
