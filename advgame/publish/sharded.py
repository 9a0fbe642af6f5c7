"""The channel of a trainer on many ranks: each sends its own shard straight to an engine's workers, NCCL or gloo.

Every sending rank has a group of its own with the workers of an engine, so that nothing passes a rank that has no use
for it, and none waits for another. Rank 0 leads: it tells the ranks and the workers when to begin, and calls a publish
off; it sends only what it holds itself.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.publish import group as groups
from advgame.publish.binding import compare
from advgame.publish.buckets import Layout
from advgame.publish.collective import CollectiveChannel
from advgame.publish.pieces import Span, digest, messages_of
from advgame.publish.plan import Source
from advgame.rollout.channel import WriteFailed
from advgame.rollout.settings import VllmSettings

TURN_S = 0.005
"""Seconds between looks at whether another engine's delivery is over."""


class Senders(Protocol):
    """The ranks that hold a player, as rank 0 reaches them.

    held: by sender, its span of every parameter. devices: their GPUs' names, or "cpu". sending: held while they send to
    one engine.
    """

    held: Sequence[Mapping[str, Span]]
    devices: Sequence[str]
    sending: threading.Lock

    def tell(self, call: str, told: Callable[[], None], **details: Any) -> dict[str, Any]:
        """Waits until they are free, tells them, calls `told`, and returns what they answer. For a thread of its own.

        The answer: `errors`, a text or None by rank; `sums`, checksums of what was sent. Raises where a rank is gone.
        """


class Sent(Mapping[str, Tensor]):
    """In the place of an engine's tensors: none. Whoever writes says `what` is to be sent (`ZeroShard.pieces`)."""

    def __init__(self) -> None:
        self.what = ""

    def __getitem__(self, name: str) -> Tensor:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class ShardsChannel(CollectiveChannel):
    """A group for each sending rank and start of the engine: rank 0 is the sender, the others are the workers."""

    def __init__(self, model: str, sources: Sequence[Source], senders: Senders, settings: VllmSettings, key: str):
        """key: this engine's, of all to which these ranks send."""
        super().__init__(model, sources, torch.device("cpu"), settings)
        count = len(senders.held)
        self.notes = (f"{count} ranks send their own shards" if count > 1 else "one rank sends all of the weights",)
        self._senders, self._key = senders, key
        self._gpus = set(senders.devices) - {"cpu"}
        self._sent = Sent()
        self._name = ""
        self._numbers = itertools.count()

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self._sent

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The ranks send to one engine at a time; waiting for another engine's turn counts against no time limit."""
        while not self._senders.sending.acquire(blocking=False):
            await asyncio.sleep(TURN_S)
        try:
            yield
        finally:
            self._senders.sending.release()

    async def _meet(self, llm: Any, layout: Layout) -> None:
        """Builds the groups."""
        here, there = set(self._senders.devices), set(await llm.collective_rpc("advgame_device"))
        if ("cpu" in here) != ("cpu" in there):
            ranks, engine = ("CPUs" if "cpu" in one else "GPUs" for one in (here, there))
            raise InputError(
                "rollout.vllm.transport: collective moves weights between GPUs (NCCL) or between CPUs (gloo); "
                f"the ranks compute on {ranks}, this engine on {engine}"
            )
        settings = self._settings
        how, limit = self._meeting(), settings.bucket_mib << 20
        self._name = how["name"]
        try:
            messages = messages_of(layout, self._senders.held, limit)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        how |= {"limit": limit, "messages": digest(messages), "over": f"{self._name}/over", **self._beginning()}
        tree = layout.to_tree()
        held = [[list(spans[one.name]) for one in layout.packed] for spans in self._senders.held]
        await self._together(llm, "advgame_join_ranks", (how, tree, held), "join", how["begin"], how=how, layout=tree)

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        """Every rank sends its shard while the workers receive; with `verify` what each rank has sent is compared with
        what each worker holds, run by run, and there with every place that it was copied to."""
        begin, seconds = self._beginning(), self._settings.publish_timeout_s
        arguments = (begin["begin"], begin["patience"], seconds, verify)
        details = {"what": self._sent.what, "seconds": seconds, "verify": verify}
        sent, received = await self._together(
            llm, "advgame_receive_ranks", arguments, "send", begin["begin"], **details
        )
        if verify:
            for found in received:
                compare(sent["sums"], found)

    def _beginning(self) -> dict[str, Any]:
        """The key that tells workers that the ranks begin. They may be in the middle of an update before."""
        return {"begin": f"{self._name}/begin/{next(self._numbers)}", "patience": self._settings.start_timeout_s}

    async def _together(
        self, llm: Any, method: str, arguments: tuple[Any, ...], call: str, begin: str, **details: Any
    ) -> tuple[dict[str, Any], list[Any]]:
        """A call of the workers and one of the ranks, which need each other. The first error calls both off.

        begin: the key by which the workers learn that the ranks begin.
        """
        store, over = self._store, f"{self._name}/over"
        given_up = threading.Event()

        def told() -> None:
            store.set(over if given_up.is_set() else begin, "")

        def tell() -> dict[str, Any]:
            try:
                return self._senders.tell(call, told, key=self._key, **details)
            except Exception as error:
                raise WriteFailed(error) from error  # a rank is gone: the trainer's own error

        async def of_the_ranks() -> dict[str, Any]:
            # the workers' call is on its way first: waiting for the ranks may hold up this event loop elsewhere
            await asyncio.sleep(0)
            answer = await groups.off_thread(tell)
            if errors := [text for text in answer["errors"] if text]:
                raise RuntimeError("; ".join(errors))
            return answer

        async def of_the_workers() -> list[Any]:
            found: list[Any] = await llm.collective_rpc(method, args=arguments)
            return found

        workers = asyncio.ensure_future(of_the_workers())
        ranks = asyncio.ensure_future(of_the_ranks())
        try:
            received, answer = await asyncio.gather(workers, ranks)
        except BaseException:
            given_up.set()
            store.set(over, "")
            raise
        finally:
            workers.cancel()
            ranks.cancel()
            store.delete_key(begin)
        return answer, received

    def _leave(self) -> None:
        """The ranks leave their groups when they are called off, and for a new start of the engine."""
