"""`cluster.address: local`: a cluster for the length of the process; nobody else reaches it, nothing outlives it."""

import subprocess
import sys
from ipaddress import ip_address

import pytest

from bench import traces

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CODE = """
import sys
from advgame.cluster.ray_cluster import connect
connect("local")
import ray
ray.get(ray.remote(lambda: None).remote())
print("joined", flush=True)
sys.stdin.readline()
"""


def loopback(text):
    address = ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_it_listens_on_loopback_alone_and_ends_with_its_process():
    pytest.importorskip("ray")
    one = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    family: list[traces.Process] = []
    try:
        assert next(line for line in one.stdout if line.startswith("joined"))
        family = traces.run_processes("none", one.pid)
        listening = traces.listeners([process.pid for process in family])
        assert len(family) >= 4, family
        assert listening
        assert all(loopback(address) for address, _ in listening), listening
        one.communicate("\n", timeout=60)
        traces.wait_for(lambda: list(filter(traces.alive, family)), 30)
        assert not [process.command for process in family if traces.alive(process)]
    finally:
        traces.end(family)
        one.kill()
        one.wait()
