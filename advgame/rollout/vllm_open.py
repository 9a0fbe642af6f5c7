"""Bringing a vLLM engine up: start, channel, weights, version; whatever fails leaves no process behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from advgame.errors import InputError
from advgame.publish.channels import guard
from advgame.publish.record import PlanRefused
from advgame.rollout.channel import Channel, Write, WriteFailed, written_into
from advgame.rollout.engine import EngineDied
from advgame.rollout.vllm_limit import Overdue, overdue
from advgame.rollout.vllm_process import Launch, Order, Process


async def opened(
    name: str, order: Order, launch: Launch, channel: Channel | None, write: Write | None, version: Callable[[], int]
) -> Process:
    """A running engine with the weights of `write` (None: the folder's own), stamped with `version()`.

    Raises EngineDied when vLLM does not start, InputError for settings that do not go with the model, WriteFailed.
    """
    process: Process | None = None
    seconds = order.settings.start_timeout_s
    limit = asyncio.timeout(seconds)
    try:
        if channel is not None:
            order = replace(order, direct=channel.direct, environment=dict(channel.prepare()))
        async with limit:  # a launch that holds up this loop keeps it itself
            process = await launch(order)
            await guard(process)
            if channel is not None:
                await channel.attach(process)
                if write is not None:
                    async with channel.turn():
                        written_into(channel, write, verify=True)
                        await channel.deliver(process, verify=True)
                    await process.reset_caches()
            await process.stamp(version())
    except BaseException as error:  # also of a caller who is cancelled
        if process is not None:
            process.kill()
        if isinstance(error, WriteFailed | InputError) or not isinstance(error, Exception):
            raise
        if isinstance(error, PlanRefused):
            raise InputError(
                f"rollout.vllm.transport: {order.settings.transport} cannot write {order.folder} where {name} "
                f"reads it: {'; '.join(error.reasons[:3])}; set loader"
            ) from error
        if limit.expired() or isinstance(error, Overdue):
            raise EngineDied(f"{name}: {overdue(seconds)}") from error
        raise EngineDied(f"{name}: vLLM does not start: {type(error).__name__}: {error}") from error
    return process
