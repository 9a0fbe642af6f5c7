"""Trainer and engine meet while the engine starts: plans go out, memory comes back, before any graph is captured.

Each rank of an engine calls the trainer right after its model is loaded, through a socket without a name in any file
system: it says where its model's loader would copy the published tensors, and learns which memory its parameters shall
live in. A line of JSON each way. Nobody else can connect: the address and the token are in the engine's environment.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from advgame.publish.plan import Plan, Source, source_problems
from advgame.publish.record import PlanRefused

VARIABLE = "ADVGAME_PUBLISH"
"""Environment variable of an engine: address, token and seconds to wait."""

Grant = Callable[[Sequence[Plan], Sequence[str]], Sequence[Mapping[str, Any]]]
"""(plans, devices) by rank -> where each rank's parameters shall live, as plain data."""


class Meeting:
    """The trainer's side, for one start of one engine. `outcome` after the engine runs; `close` in any case."""

    def __init__(self, model: str, sources: Sequence[Source], grant: Grant, seconds: float = 600.0):
        self._hello = {"model": model, "sources": [[source.name, list(source.shape)] for source in sources]}
        self._grant = grant
        self._name = f"advgame-{secrets.token_hex(8)}"
        self._token = secrets.token_hex(16)
        self._seconds = seconds
        self._plans: list[Plan] = []
        self._error: Exception | None = None
        self._connections: list[socket.socket] = []
        self._over = threading.Event()
        self._done = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"\0{self._name}")
        self._socket.listen(64)
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="advgame-meeting")
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: f"{self._name} {self._token} {self._seconds:g}"}

    def outcome(self, seconds: float = 5.0) -> list[Plan]:
        """The ranks' plans, their parameters now living in the granted memory.

        Raises PlanRefused with the ranks' reasons, whatever the grant raised, or RuntimeError if nobody came.
        """
        self._done.wait(seconds)
        if self._error is not None:
            raise self._error
        if not self._plans:
            raise RuntimeError("the engine started without asking where its weights should live: is its plugin there?")
        return self._plans

    def close(self) -> None:
        self._over.set()
        for connection in list(self._connections):
            with suppress(OSError):  # wakes a read from a rank that hangs
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        with ExitStack() as stack:
            ranks: dict[int, tuple[_Line, dict[str, Any]]] = {}
            try:
                while not self._over.is_set() and len(ranks) < _world(ranks):
                    try:
                        connection, _ = self._socket.accept()
                    except TimeoutError:
                        continue
                    self._connections.append(connection)
                    connection.settimeout(self._seconds)
                    line = _Line(stack.enter_context(connection))
                    if line.read().get("token") != self._token:
                        connection.shutdown(socket.SHUT_RDWR)
                        continue
                    line.write(self._hello)
                    answer = line.read()
                    ranks[answer["rank"]] = line, answer
                if not self._over.is_set():
                    self._settle([ranks[rank] for rank in sorted(ranks)])
            except Exception as error:
                self._error = error
            finally:
                self._done.set()

    def _settle(self, ranks: Sequence[tuple[_Line, dict[str, Any]]]) -> None:
        """All ranks are there: memory for all of them, or for none."""
        reasons = [reason for _, answer in ranks for reason in answer.get("refused", ())]
        try:
            if reasons:
                raise PlanRefused(list(dict.fromkeys(reasons)))
            plans = [Plan.from_tree(answer["plan"]) for _, answer in ranks]
            if found := source_problems(plans):
                raise PlanRefused(found)
            granted = self._grant(plans, [answer["device"] for _, answer in ranks])
        except Exception:
            for line, _ in ranks:
                line.write({"memory": None})
            raise
        for (line, _), memory in zip(ranks, granted, strict=True):
            line.write({"memory": memory})
        reasons = [reason for line, _ in ranks for reason in line.read().get("refused", ())]
        if reasons:
            raise PlanRefused(list(dict.fromkeys(reasons)))
        self._plans = plans


class Call:
    """An engine rank's side: `hello` is what the trainer publishes, then `answer`, then `settled`."""

    def __init__(self, variable: str):
        name, token, seconds = variable.split()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(float(seconds))
        self._socket.connect(f"\0{name}")
        self._line = _Line(self._socket)
        self._line.write({"token": token})
        hello = self._line.read()
        self.model: str = hello["model"]
        self.sources = [Source(source, tuple(shape)) for source, shape in hello["sources"]]

    def answer(
        self, rank: int, world_size: int, device: str, plan: Plan | None, refused: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """Sends this rank's plan, or why there is none; returns the memory it got, None for none."""
        tree = {} if plan is None else {"plan": plan.to_tree()}
        self._line.write({"rank": rank, "world": world_size, "device": device, "refused": list(refused), **tree})
        memory: dict[str, Any] | None = self._line.read()["memory"]
        return memory

    def settled(self, refused: Sequence[str] = ()) -> None:
        """Says that the parameters live there now, or why they cannot."""
        self._line.write({"refused": list(refused)})

    def close(self) -> None:
        self._socket.close()


def _world(ranks: Mapping[int, tuple[_Line, dict[str, Any]]]) -> int:
    return next((answer["world"] for _, answer in ranks.values()), 1)


class _Line:
    """Messages of one JSON line each."""

    def __init__(self, connection: socket.socket):
        self._file = connection.makefile("rw", encoding="utf-8")

    def write(self, message: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def read(self) -> dict[str, Any]:
        text = self._file.readline()
        if not text:
            raise ConnectionError("the other side of the meeting is gone")
        message: dict[str, Any] = json.loads(text)
        return message
