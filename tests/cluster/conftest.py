"""A Ray cluster of several nodes on this machine, for the files beside this one."""

import secrets

import pytest


@pytest.fixture(scope="module")
def cluster(request):
    """A head without CPUs, and nodes with as many as the file's NODES says, behind a token."""
    ray = pytest.importorskip("ray")
    from ray._raylet import AuthenticationTokenLoader, Config
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        Config.initialize("")  # it was read when Ray was imported
        AuthenticationTokenLoader.instance().reset_cache()
        # Ray's own 15 s and more until it gives a node up would be most of the test
        health = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
        made = Cluster(initialize_head=True, head_node_args=head)
        for cpus in request.module.NODES:
            made.add_node(num_cpus=cpus)
        yield made
        ray.shutdown()
        made.shutdown()
