"""The settings of placement, which the config tree includes as `cluster:`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from advgame.rollout.settings import EngineName
from advgame.settings import Section

BundleName = EngineName | Literal["trainer"]


class ClusterSettings(Section):
    """Where engines and trainer ranks run. `--cluster ray` is short for `--cluster.placement ray`."""

    placement: Literal["local", "ray"] = Field(
        "local", description="local: on this machine, without Ray; ray: every vLLM engine is a Ray actor."
    )
    address: str = Field(
        "auto",
        description="ray: auto (the cluster of RAY_ADDRESS or of this machine), local (one of this machine's own for "
        "the length of the run), host:port, or ray://host:port.",
    )
    trainer_ranks: PositiveInt | None = Field(
        None,
        description="ray, with learn.backend: deepspeed: so many Ray actors train, and the process that was started "
        "leads and trains nothing; null: it trains, with the ranks that torchrun starts.",
    )
    trainer_restarts: NonNegativeInt = Field(
        3, description="ray: how often a run goes on from its last checkpoint with new trainer ranks when one dies."
    )
    trainer_start_s: PositiveFloat = Field(
        600.0,
        description="ray: longest start of the trainer's ranks, the wait for a node in a dead one's place included.",
    )
    strategy: Literal["PACK", "SPREAD"] = Field("PACK", description="ray: engines and ranks on few nodes, or on many.")
    cpus: dict[BundleName, PositiveFloat] = Field(
        {}, description="ray: CPU cores of each replica, and of each rank (trainer); 1 if not said."
    )
    gpus: dict[BundleName, NonNegativeFloat] = Field(
        {},
        description="ray: GPUs of each replica and rank (trainer); if not said rollout.vllm.tensor_parallel and 1, and "
        "0 on a cluster without.",
    )
    patience_s: PositiveFloat = Field(30.0, description="ray: longest wait for the resources of engines and ranks.")
    silence_s: PositiveFloat = Field(
        3.5, description="ray: silence of an engine or a trainer rank after which it counts as dead."
    )
