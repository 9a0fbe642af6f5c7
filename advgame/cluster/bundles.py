"""What every engine and trainer rank of a run needs of a cluster, and which need cannot be met; plain data, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advgame.cluster.settings import ClusterSettings

TRAINER = "trainer"
"""What trainer ranks are called among the engines."""


@dataclass(frozen=True)
class Bundle:
    """One replica's or trainer rank's share of one node; both count from 0."""

    engine: str
    replica: int
    cpus: float
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        kind = "rank" if self.engine == TRAINER else "replica"
        return f"{self.engine} {kind} {self.replica + 1} ({self.cpus:g} CPU{gpus})"


def bundles_of(
    settings: ClusterSettings, engines: Mapping[str, int], tensor_parallel: int, *, gpus: bool
) -> list[Bundle]:
    """Of the trainer's ranks, then of the engines. engines: replicas by name. gpus: whether the cluster has any."""
    cores: Mapping[Any, float] = settings.cpus
    cards: Mapping[Any, float] = settings.gpus
    wanted = {TRAINER: (settings.trainer_ranks or 0, 1)} | {name: (n, tensor_parallel) for name, n in engines.items()}
    return [
        Bundle(name, number, cores.get(name, 1.0), cards.get(name, float(most if gpus else 0)))
        for name, (count, most) in wanted.items()
        for number in range(count)
    ]


def first_unplaced(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> Bundle | None:
    """The first bundle without room when the large ones choose first; `nodes`: what each has. None: all fit."""
    left = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda one: (-one.gpus, -one.cpus)):
        fits = (node for node in left if all(node.get(k, 0.0) >= v for k, v in bundle.resources.items()))
        # the fullest node that has room
        node = min(fits, key=lambda one: (one.get("GPU", 0.0), one.get("CPU", 0.0)), default=None)
        if node is None:
            return bundle
        for kind, amount in bundle.resources.items():
            node[kind] -= amount
    return None
