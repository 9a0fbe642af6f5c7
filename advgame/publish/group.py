"""A process group of the trainer and one engine's workers, apart from every other group of either: NCCL, or gloo.

Built from a store and a back end alone, so that torch's default group stays free on both sides. Every call that waits
for the other side has a time limit; the trainer makes them in threads of their own (`off_thread`).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from advgame.daemons import start_daemon
from advgame.environ import variables
from advgame.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
T = TypeVar("T")

LOOK_S = 0.05
"""Seconds between looks at whether a call is still wanted."""

_left: list[tuple[float, Any]] = []
"""Groups in which a call may still hang, and when it will have run out: their destructors wait for it."""

_stores: dict[tuple[str, int], Any] = {}


def open_store(host: str, port: int, field: str = "rollout.vllm.rendezvous_port") -> Any:
    """This process's store at `port` (0: any free one), opened once. InputError: the port is taken or not ours.

    At a loopback address it listens there alone; torch's own listens on every interface.
    """
    if (host, port) not in _stores:
        try:
            free, bound = _bound(host, port)
            store: Any = dist.TCPStore(host, free, None, True, timedelta(seconds=60), wait_for_workers=False, **bound)
        except (dist.DistError, RuntimeError, OSError) as error:
            reason = (
                "is taken" if "address already in use" in str(error).lower() else f"cannot be opened ({_first(error)})"
            )
            raise InputError(f"{field}: port {port} {reason}; give a free one, or 0 to have one chosen") from error
        _stores[host, port] = store
    return _stores[host, port]


def reach(host: str, port: int, seconds: float) -> Any:
    """A connection to the trainer's store. RuntimeError: there is none within `seconds`."""
    return dist.TCPStore(host, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)


def await_key(store: Any, key: str, seconds: float) -> None:
    """Returns when somebody has set `key`. RuntimeError after `seconds`."""
    store.wait([key], timedelta(seconds=seconds))


def _bound(host: str, port: int) -> tuple[int, dict[str, Any]]:
    """The port, and what a store is told besides of the socket to listen on."""
    if host not in LOOPBACK:
        return port, {}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as at:
        return at.getsockname()[1], {"master_listen_fd": at.detach()}


def join(store: Any, name: str, rank: int, size: int, *, device: torch.device, host: str, seconds: float) -> Any:
    """The group `name`, once all `size` members have come; rank 0 is who sends. RuntimeError after `seconds`."""
    prefixed = dist.PrefixStore(name, store)
    limit = timedelta(seconds=seconds)
    if device.type != "cuda":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        here = host in LOOPBACK
        options._devices = [gloo.create_device(hostname=host) if here else gloo.create_default_device()]
        options._timeout = limit
        return gloo(prefixed, rank, size, options)
    nccl: Any = dist.ProcessGroupNCCL
    # else torch's watchdog would end this process when the other side dies
    with variables({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}), torch.cuda.device(device):
        options = nccl.Options()
        options._timeout = limit
        return nccl(prefixed, rank, size, options)


def broadcast(group: Any, tensor: Tensor, seconds: float, called_off: Callable[[], bool] | None = None) -> None:
    """From rank 0 to everybody; on the CPU it is there when this returns, on a GPU the current stream waits for it.

    RuntimeError: the other side is gone, or silent for `seconds`; or `called_off`, which is asked meanwhile, says so.
    The group is of no use then.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    work = group.broadcast([tensor], options)
    if called_off is None:
        work.wait(timedelta(seconds=seconds))
        return
    started = looked = time.monotonic()
    pause = 5e-5
    while not work.is_completed():
        now = time.monotonic()
        if now - looked > LOOK_S:
            looked = now
            if called_off() or now - started > seconds:
                leave(group)
                _left.append((now + seconds, group))
                raise RuntimeError("called off" if now - started <= seconds else f"nobody received for {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
    work.wait(timedelta(seconds=seconds))


def greet(group: Any, device: torch.device, seconds: float) -> None:
    """One byte from rank 0 to everybody: NCCL connects in its first call, without a time limit of its own."""
    broadcast(group, torch.zeros(1, dtype=torch.uint8, device=device), seconds)


def limited(call: Callable[[], T], seconds: float, called_off: Callable[[], bool]) -> T:
    """`call()` in a thread, which is left alone when it takes longer than `seconds`, or `called_off` says so.

    Raises what it raises, and RuntimeError.
    """
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(call())
        except Exception as error:
            failed.append(error)

    thread = start_daemon(run, "advgame-collective")
    until = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(LOOK_S)
        if not thread.is_alive():
            break
        if called_off():
            raise RuntimeError("called off")
        if time.monotonic() > until:
            raise RuntimeError(f"nobody came within {seconds:g} s")
    if failed:
        raise failed[0]
    return done[0]


def whether(host: str, port: int, key: str, seconds: float) -> Callable[[], bool]:
    """Tells, whenever it is called, whether somebody has set `key` in the store, or the store is gone."""
    store = reach(host, port, seconds)

    def told() -> bool:
        try:
            return bool(store.check([key]))
        except RuntimeError:
            return True

    return told


def leave(group: Any) -> None:
    """Gives a group up, also while one of its calls hangs."""
    for name in ("abort", "shutdown"):
        if (end := getattr(group, name, None)) is not None:
            with suppress(RuntimeError, NotImplementedError):
                end()
            break
    now = time.monotonic()
    _left[:] = [(until, one) for until, one in _left if until > now]


async def off_thread(call: Callable[[], Any]) -> Any:
    """`call()` in a daemon thread: a call that hangs holds up neither the event loop nor the process's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            result, error = call(), None
        except Exception as raised:
            result, error = None, raised
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    start_daemon(run, "advgame-collective")
    return await future


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]
