"""A start that hangs ends with `start_timeout_s`, or when nobody wants it; what it made goes, nothing else does."""

import asyncio
import multiprocessing
import os
import subprocess
import threading
import time
from contextlib import contextmanager
from multiprocessing import connection
from types import SimpleNamespace

import engines
import pytest

from advgame.rollout import vllm_limit, vllm_process, vllm_start
from advgame.rollout.engine import EngineDied
from advgame.rollout.vllm_open import opened
from advgame.rollout.vllm_process import Order, ThreadedProcess, launch, launch_threaded

FORK = multiprocessing.get_context("fork")
SHORT_S, LONG_S = 2.0, 60.0
SAYS = r"^defender: vLLM does not start within 2 s; raise rollout\.vllm\.start_timeout_s, or set VLLM_LOGGING_LEVEL"


def asleep(worker=None):
    """An engine's process with a worker below it."""
    if worker is not None:
        worker.value = subprocess.Popen(["sleep", str(LONG_S)], start_new_session=True).pid
    time.sleep(LONG_S)


class Blocking:
    """Stands for vLLM's start: waits without end for a process of its own, which never answers, and raises when that
    one is gone."""

    def __init__(self):
        self.worker, self.cores, self.seen = FORK.Value("i", 0), [], []

    def __call__(self, arguments, settings, device, more=None):
        with vllm_start.environment(settings, device, more):
            self.seen.append(os.environ[vllm_start.PARENT])
            core = FORK.Process(target=asleep, args=(self.worker,), name="EngineCore", daemon=True)
            core.start()
            self.cores.append(core.pid)
            connection.wait([core.sentinel], 20.0)
            core.join(0)
            raise RuntimeError("Engine core initialization failed. See root cause above.")

    @property
    def pids(self):
        return [*self.cores, self.worker.value]


@pytest.fixture
def blocking(monkeypatch):
    monkeypatch.delenv(vllm_start.PARENT, raising=False)
    made = Blocking()
    monkeypatch.setattr(vllm_start, "start", made)
    return made


@contextmanager
def bystanders():
    """What must live on: an engine from before, and a child of another kind that comes meanwhile."""
    older = FORK.Process(target=asleep, name="EngineCore", daemon=True)
    other = FORK.Process(target=asleep, name="advgame-sampler", daemon=True)
    older.start()
    later = threading.Timer(0.2, other.start)
    later.start()
    try:
        yield
        later.join()
        assert older.is_alive()
        assert other.is_alive()
    finally:
        for process in (older, other):
            process.kill()
            process.join()


def soon(condition, seconds=5.0):
    asyncio.run(engines.until(condition, seconds))


def order(tmp_path, seconds=SHORT_S):
    return Order(tmp_path, engines.settings(start_timeout_s=seconds), "float32", (2,))


def opening(order, how):
    return opened("defender", order, how, None, None, lambda: 0)


def assert_nothing_is_left(blocking):
    assert len(blocking.seen) == len(blocking.cores) > 0
    soon(lambda: not any(engines.running(pid) for pid in blocking.pids))
    assert vllm_start.PARENT not in os.environ
    assert not [t for t in threading.enumerate() if t.name in ("advgame-engine", "advgame-start")]


@pytest.mark.parametrize("how", [launch, launch_threaded], ids=["here", "threaded"])
def test_a_start_that_hangs_ends_in_time_and_leaves_nothing(tmp_path, blocking, how):
    with bystanders():
        for _ in range(2):  # the first one holds up nobody
            began = time.perf_counter()
            with pytest.raises(EngineDied, match=SAYS) as raised:
                asyncio.run(opening(order(tmp_path), how))
            assert time.perf_counter() - began < SHORT_S + 8
            assert "\n" not in str(raised.value)
            assert_nothing_is_left(blocking)


def test_one_that_is_called_off_ends_at_once(tmp_path, blocking):
    async def run():
        start = asyncio.create_task(opening(order(tmp_path, LONG_S), launch_threaded))
        await engines.until(lambda: blocking.worker.value)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    began = time.perf_counter()
    asyncio.run(run())
    assert time.perf_counter() - began < SHORT_S + 8
    assert_nothing_is_left(blocking)


def test_who_waits_for_anothers_start_waits_no_longer_than_its_own_limit(tmp_path, blocking):
    async def run():
        first = asyncio.create_task(opening(order(tmp_path, LONG_S), launch_threaded))
        await engines.until(lambda: blocking.worker.value)
        with pytest.raises(EngineDied, match=SAYS):
            await opening(order(tmp_path), launch)
        assert engines.running(blocking.cores[0]), "the first one's process is not the second's"
        first.cancel()
        await asyncio.wait([first])

    began = time.perf_counter()
    asyncio.run(run())
    assert time.perf_counter() - began < SHORT_S + 12
    assert len(blocking.cores) == 1
    assert_nothing_is_left(blocking)


def test_an_error_of_its_own_is_told_as_it_is(tmp_path, monkeypatch):
    def start(*arguments):
        raise ValueError("no such dtype")

    monkeypatch.setattr(vllm_start, "start", start)
    for how in (launch, launch_threaded):
        with pytest.raises(EngineDied, match=r"^defender: vLLM does not start: ValueError: no such dtype$"):
            asyncio.run(opening(order(tmp_path, LONG_S), how))
    assert vllm_limit._starting.acquire(blocking=False)
    vllm_limit._starting.release()


@pytest.mark.parametrize("how", ["end", "kill"])
def test_a_thread_ends_also_when_vllm_fails_to_shut_down(how):
    def shutdown():
        raise RuntimeError("no")

    core = FORK.Process(target=asleep, daemon=True)
    core.start()
    resources = SimpleNamespace(engine_manager=SimpleNamespace(processes=[core]))
    config = SimpleNamespace(get_vocab_size=lambda: 32, max_model_len=8)
    llm = SimpleNamespace(model_config=config, engine_core=SimpleNamespace(resources=resources), shutdown=shutdown)
    made = ThreadedProcess()
    made._process = vllm_process.LocalProcess(llm, (2,))
    began = time.perf_counter()
    getattr(made, how)()
    made.join(5.0)
    assert time.perf_counter() - began < 20
    assert not made._thread.is_alive()
    core.join(5.0)
    assert not core.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("how", [launch, launch_threaded], ids=["here", "threaded"])
def test_a_real_start_that_takes_too_long(runner, tmp_path, how):
    pytest.importorskip("vllm.v1.engine.async_llm")
    folder = engines.folder(tmp_path / "m")
    children = {child.pid for child in multiprocessing.active_children()}
    began = time.perf_counter()
    engine = engines.vllm_engine(folder, vllm=engines.settings(start_timeout_s=SHORT_S), launch=how)
    with pytest.raises(EngineDied, match=SAYS):
        runner.run(engine.start())
    assert time.perf_counter() - began < 120  # vLLM is imported first; without the limit it would be never
    soon(lambda: {child.pid for child in multiprocessing.active_children()} <= children, 10.0)
    assert vllm_start.PARENT not in os.environ
    engine = engines.vllm_engine(folder, launch=how)
    try:
        (answer,) = engines.play(runner, engine, [engines.request((3, 9, 10))])
        assert answer.token_ids
    finally:
        runner.run(engine.close())
