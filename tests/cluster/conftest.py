"""A Ray cluster of several nodes on this machine, for the files beside this one."""

import pytest

from bench import ray_nodes

HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
"""Ray's own 15 s and more until it gives a node up would be most of the test."""


@pytest.fixture(scope="module")
def cluster(request):
    """A head without CPUs, and nodes with as many as the file's NODES says, behind a token."""
    pytest.importorskip("ray")
    with ray_nodes.nodes(request.module.NODES, HEALTH) as made:
        yield made
