"""A Ray cluster of several nodes on this machine, behind a token; each node is a raylet, a process of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from advgame.environ import variables

ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
"""Beside the token; children that join the cluster inherit both."""


@contextmanager
def nodes(cpus: Sequence[int], system: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Ray's own `Cluster`: a head without CPUs, and a node of so many each. system: Ray's internal settings.

    What the environment said before stands there again afterwards.
    """
    with variables(ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        import ray
        from ray._raylet import AuthenticationTokenLoader, Config
        from ray.cluster_utils import Cluster

        Config.initialize("")  # it was read when Ray was imported
        AuthenticationTokenLoader.instance().reset_cache()
        head = {"num_cpus": 0, "include_dashboard": False}
        if system is not None:
            head["_system_config"] = dict(system)
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            for count in cpus:
                made.add_node(num_cpus=count)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
