"""Trainer and engine meet while the engine starts: plans go out, memory comes back, before any graph is captured.

Each rank of an engine calls the trainer right after its model is loaded, through a socket without a name in any file
system: it says where its model's loader would copy the published tensors, and learns which memory its parameters shall
live in. A line of JSON each way. Both sides look whose process the other is; address and token are in the engine's
environment, and whoever has no token is turned away.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from advgame.publish.plan import Plan, Source, source_problems
from advgame.publish.record import PlanRefused

VARIABLE = "ADVGAME_PUBLISH"
"""Environment variable of an engine: address, token and seconds to wait."""

GREETING_S = 2.0
"""Seconds within which whoever connects must show the token."""

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
                    line = _Line(connection)
                    if not _is_ours(connection) or not self._greeted(connection, line):
                        connection.close()
                        continue
                    stack.enter_context(connection)
                    self._connections.append(connection)
                    if self._over.is_set():  # `close` may have looked through the connections already
                        break
                    connection.settimeout(self._seconds)
                    line.write(self._hello)
                    answer = line.read()
                    ranks[answer["rank"]] = line, answer
                if not self._over.is_set():
                    self._settle([ranks[rank] for rank in sorted(ranks)])
            except Exception as error:
                self._error = error
            finally:
                self._socket.close()  # whoever comes now is turned away, rather than left waiting
                self._done.set()

    def _greeted(self, connection: socket.socket, line: _Line) -> bool:
        """Whether the first line came in time and holds the token; anything else is a stranger's."""
        connection.settimeout(GREETING_S)
        try:
            shown = line.read(within=GREETING_S).get("token")
        except (OSError, ValueError, AttributeError):  # silence, no text, no JSON, no object
            return False
        return isinstance(shown, str) and secrets.compare_digest(shown.encode(), self._token.encode())

    def _settle(self, ranks: Sequence[tuple[_Line, dict[str, Any]]]) -> None:
        """All ranks are there: memory for all of them, or for none."""
        reasons = [reason for _, answer in ranks for reason in answer.get("refused", ())]
        try:
            if reasons:
                raise PlanRefused(list(dict.fromkeys(reasons)))
            plans = [Plan.from_tree(answer["plan"]) for _, answer in ranks]
            if [plan.hash for plan in plans] != [answer["hash"] for _, answer in ranks]:
                raise PlanRefused(["the plan that arrived is not the one that the engine made"])
            if found := source_problems(plans):
                raise PlanRefused(found)
            granted = self._grant(plans, [answer["device"] for _, answer in ranks])
        except Exception:
            for line, _ in ranks:
                line.write({"memory": None})
            raise
        for (line, _), memory, plan in zip(ranks, granted, plans, strict=True):
            line.write({"memory": memory, "hash": plan.hash})
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
        if not _is_ours(self._socket):
            raise ConnectionError("somebody else answers in the trainer's place")
        self._line = _Line(self._socket)
        self._line.write({"token": token})
        hello = self._line.read()
        self.model: str = hello["model"]
        self.sources = [Source(source, tuple(shape)) for source, shape in hello["sources"]]

    def answer(
        self, rank: int, world_size: int, device: str, plan: Plan | None, refused: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """Sends this rank's plan, or why there is none; returns the memory it got, None for none.

        RuntimeError: the trainer would write by another plan.
        """
        tree = {} if plan is None else {"plan": plan.to_tree(), "hash": plan.hash}
        self._line.write({"rank": rank, "world": world_size, "device": device, "refused": list(refused), **tree})
        reply = self._line.read()
        memory: dict[str, Any] | None = reply["memory"]
        if memory is not None and (plan is None or reply["hash"] != plan.hash):
            raise RuntimeError("the trainer would write by another plan than this engine's")
        return memory

    def settled(self, refused: Sequence[str] = ()) -> None:
        """Says that the parameters live there now, or why they cannot."""
        self._line.write({"refused": list(refused)})

    def close(self) -> None:
        self._socket.close()


def _world(ranks: Mapping[int, tuple[_Line, dict[str, Any]]]) -> int:
    return next((answer["world"] for _, answer in ranks.values()), 1)


def _is_ours(connection: socket.socket) -> bool:
    """Whether a process of this user (or root) is at the other end."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return user in (os.getuid(), 0)


class _Line:
    """Messages of one JSON line each."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._rest = b""

    def write(self, message: Mapping[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, within: float | None = None) -> dict[str, Any]:
        """The next message, by the connection's own time limit a piece and `within` seconds in all.

        ConnectionError: the other side is gone; TimeoutError; ValueError: no JSON.
        """
        over = None if within is None else time.monotonic() + within
        pieces = [self._rest]
        while b"\n" not in pieces[-1]:
            if over is not None and (time.monotonic() > over or len(pieces) > 16):
                raise TimeoutError("no line in time")
            piece = self._connection.recv(1 << 16)
            if not piece:
                raise ConnectionError("the other side of the meeting is gone")
            pieces.append(piece)
        text, _, self._rest = b"".join(pieces).partition(b"\n")
        message: dict[str, Any] = json.loads(text)
        return message
