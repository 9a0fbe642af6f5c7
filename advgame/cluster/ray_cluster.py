"""A Ray cluster as a run uses it: joined or started, its resources reserved before anything loads, released after."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from advgame.cluster.bundles import TRAINER, Bundle, bundles_of, first_unplaced
from advgame.cluster.settings import ClusterSettings
from advgame.errors import InputError
from advgame.rollout.vllm_process import Launch

FIELD = "cluster.address"

ANSWER_S = 5.0
"""Longest wait for a cluster's port."""


class Cluster:
    """A reservation of one bundle for each engine and trainer rank, kept until `close`. host: this process's address as
    other nodes see it."""

    def __init__(self, settings: ClusterSettings, bundles: Sequence[Bundle], group: Any, host: str):
        self.settings, self.bundles, self.host = settings, tuple(bundles), host
        self._group = group

    @property
    def gpus(self) -> bool:
        """Whether engines compute on GPUs."""
        return any(bundle.gpus for bundle in self.bundles if bundle.engine != TRAINER)

    @property
    def ranks(self) -> list[Bundle]:
        """The trainer's bundles."""
        return [bundle for bundle in self.bundles if bundle.engine == TRAINER]

    def launch(self, engine: str, replica: int) -> Launch:
        """Starts that engine's actor in its bundle."""
        from advgame.cluster.ray_process import launch_actor

        bundle = next(b for b in self.bundles if (b.engine, b.replica) == (engine, replica))
        return partial(launch_actor, options=self.options(bundle), silence_s=self.settings.silence_s)

    def options(self, bundle: Bundle) -> dict[str, Any]:
        """Of an actor in a bundle, wherever Ray has put (or, after a node's death, moved) it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self.bundles.index(bundle))
        return {"num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "scheduling_strategy": place}

    def without_room(self) -> str:
        """Who has no room left on the nodes that are there now; empty if all have."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        missing = first_unplaced(self.bundles, nodes)
        return "" if missing is None else f"no room for {missing}"

    def close(self) -> None:
        """Gives the resources back; the connection stays for this process's next run."""
        import ray
        from ray.util import remove_placement_group

        if ray.is_initialized():
            remove_placement_group(self._group)


def open_cluster(settings: ClusterSettings, engines: Mapping[str, int], tensor_parallel: int) -> Cluster:
    """Connects and reserves. engines: replicas by name.

    Raises InputError: Ray missing, no cluster at the address, or not enough of something (which bundle has no room).
    """
    connect(settings.address)
    import ray
    from ray.util import placement_group, remove_placement_group

    own = ray.get_runtime_context().get_node_id()
    host = next((node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own), "127.0.0.1")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = bundles_of(settings, engines, tensor_parallel, gpus=any(node.get("GPU") for node in nodes))
    group = placement_group([bundle.resources for bundle in bundles], strategy=settings.strategy)
    if not group.wait(settings.patience_s):
        remove_placement_group(group)
        raise InputError(_no_room(settings, bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]]))
    return Cluster(settings, bundles, group, host)


def connect(address: str) -> None:
    """This process joins the cluster at `address`, or starts one; does nothing if it has joined before."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("cluster.placement: Ray is not installed; install it with: pip install 'advgame[ray]'")
    # read when Ray is imported; nothing leaves the cluster
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # what Ray does where its clusters are of one machine: it listens on loopback only
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return
    check_answers(address if address == "local" else os.environ.get("RAY_ADDRESS") or address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())
        if "token" in said.lower() or "auth" in said.lower():
            raise InputError(
                f"{FIELD}: the cluster at {address} wants its token; put it into ~/.ray/auth_token, or its file's path "
                "into RAY_AUTH_TOKEN_PATH"
            ) from error
        where = "on this machine" if address == "auto" else f"at {address}"
        raise InputError(
            f"{FIELD}: no Ray cluster {where} ({said[:160]}); start one (ray start --head), or set local"
        ) from error


def check_answers(address: str) -> None:
    """InputError if nobody listens at host:port, which Ray itself would find out after minutes."""
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise InputError(f"{FIELD}: {address} is no address; give auto, local, host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise InputError(
            f"{FIELD}: no Ray cluster at {address} ({(error.strerror or str(error)).lower()}); start one "
            "(ray start --head), or set local"
        ) from error


def _no_room(settings: ClusterSettings, bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> str:
    has = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
    fewer = (
        "rollout.vllm.replicas" if settings.trainer_ranks is None else "rollout.vllm.replicas, cluster.trainer_ranks"
    )
    mend = f"lower {fewer}, cluster.cpus or cluster.gpus, or add nodes"
    missing = first_unplaced(bundles, nodes)
    if missing is None:
        who = "engines" if settings.trainer_ranks is None else "engines and ranks"
        return (
            f"cluster.patience_s: the cluster is busy, {len(bundles)} {who} found no room within "
            f"{settings.patience_s:g} s; wait, or {mend}"
        )
    return f"cluster: no room for {missing}; the nodes have {has}; {mend}"
