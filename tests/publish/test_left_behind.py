"""What a trainer killed with SIGKILL leaves of its engines: no process, no shared memory; what goes with the next."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import engines
import pytest

from advgame.rollout import vllm_sockets
from bench import traces

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

TRAINER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import engines, models
from advgame.publish.channels import ShmChannel
from advgame.publish.plan import sources_of
async def main():
    model = models.model(seed=0, hidden=engines.HIDDEN)
    channel = ShmChannel("m", sources_of(model.named_parameters()))
    settings = engines.settings(tensor_parallel={parallel})
    engine = engines.vllm_engine(Path({folder!r}), channel=channel, vllm=settings)
    await engine.start()
    print("serves", flush=True)
    await asyncio.sleep(100)
if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return engines.folder(tmp_path_factory.mktemp("m") / "m", seed=0)


@pytest.mark.parametrize(("parallel", "everybody"), [(1, False), (2, False), (2, True)])
def test_a_killed_trainer(tmp_path, folder, monkeypatch, parallel, everybody):
    """Alone; and with all that it started at once, Python's own sweeper too: the next start deletes what is left."""
    temporary = Path(tempfile.mkdtemp())  # pytest's own would be too long for sockets
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(tests=str(Path(engines.__file__).parent), folder=str(folder), parallel=parallel))
    trainer = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    family: list[traces.Process] = []
    try:
        assert next(line for line in trainer.stdout if line.startswith("serves"))
        family = traces.run_processes("none", trainer.pid)
        shared = traces.held([one.pid for one in family])
        assert len(shared) == (0 if parallel == 1 else 4), shared  # queues between the processes, and nothing else
        shared |= {path.name for one in family for path in Path("/dev/shm").glob(f"sem.loky-{one.pid}-*")}
        if everybody:
            traces.end(sorted(family, key=lambda one: "resource_tracker" not in one.command))
        trainer.kill()
        trainer.wait()
        traces.wait_for(lambda: list(filter(traces.alive, family)), 10)
        assert not list(filter(traces.alive, family)), "engines outlive their trainer"
        if everybody:
            assert len(shared & set(os.listdir("/dev/shm"))) >= 4
        monkeypatch.setattr(vllm_sockets, "YOUNG_S", -1.0)
        vllm_sockets.sweep(temporary)
        traces.wait_for(lambda: shared & set(os.listdir("/dev/shm")), 5)
        assert not shared & set(os.listdir("/dev/shm"))
        assert not list(temporary.glob("advgame-vllm-*"))
    finally:
        traces.end(family)
        trainer.kill()
        trainer.wait()
        shutil.rmtree(temporary)
