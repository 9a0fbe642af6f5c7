"""The settings of placement, which the config tree includes as `cluster:`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from advgame.rollout.settings import EngineName
from advgame.settings import Section


class ClusterSettings(Section):
    """Where vLLM engines run. `--cluster ray` is short for `--cluster.placement ray`."""

    placement: Literal["local", "ray"] = Field(
        "local", description="local: on this machine, without Ray; ray: every engine is a Ray actor."
    )
    address: str = Field(
        "auto",
        description="ray: auto (the cluster of RAY_ADDRESS or of this machine), local (one of this machine's own for "
        "the length of the run), host:port, or ray://host:port.",
    )
    strategy: Literal["PACK", "SPREAD"] = Field("PACK", description="ray: engines on few nodes, or on many.")
    cpus: dict[EngineName, PositiveFloat] = Field({}, description="ray: CPU cores of each replica; 1 if not said.")
    gpus: dict[EngineName, NonNegativeFloat] = Field(
        {},
        description="ray: GPUs of each replica; if not said rollout.vllm.tensor_parallel, and 0 on a cluster without.",
    )
    patience_s: PositiveFloat = Field(30.0, description="ray: longest wait for the resources of all engines.")
    silence_s: PositiveFloat = Field(3.5, description="ray: silence of an engine after which it counts as dead.")
