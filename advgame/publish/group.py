"""A process group of the trainer and one engine's workers, apart from every other group of either: NCCL, or gloo.

Built from a store and a back end alone, so that torch's default group stays free on both sides. Every call that waits
for the other side has a time limit; the trainer makes them in threads of their own (`off_thread`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advgame.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

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


def _bound(host: str, port: int) -> tuple[int, dict[str, Any]]:
    """The port, and what a store is told besides of the socket to listen on."""
    if host not in LOOPBACK:
        return port, {}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as at:
        return at.getsockname()[1], {"master_listen_fd": at.detach()}


def join(store: Any, name: str, rank: int, size: int, *, device: torch.device, host: str, seconds: float) -> Any:
    """The group `name`, once all `size` members have come; rank 0 is the trainer. RuntimeError after `seconds`."""
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
    before = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    # else torch's watchdog would end this process when the other side dies
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        with torch.cuda.device(device):
            options = nccl.Options()
            options._timeout = limit
            return nccl(prefixed, rank, size, options)
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        else:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = before


def broadcast(group: Any, tensor: Tensor, seconds: float) -> None:
    """From rank 0 to everybody; on the CPU it is there when this returns, on a GPU the current stream waits for it."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait(timedelta(seconds=seconds))


def leave(group: Any) -> None:
    """Gives a group up, also while one of its calls hangs."""
    for name in ("abort", "shutdown"):
        if (end := getattr(group, name, None)) is not None:
            with suppress(RuntimeError, NotImplementedError):
                end()
            return


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

    threading.Thread(target=run, daemon=True, name="advgame-collective").start()
    return await future


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]
