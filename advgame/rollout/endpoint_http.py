"""JSON over HTTP to one server: a thread pool of kept connections, whole-answer time limits, retries with back-off."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from advgame.rollout.engine import EngineError

LONGEST_WAIT_S = 60.0
"""No back-off, and no Retry-After of a server, makes a request wait longer than this before its next try."""

LONGEST_ANSWER = 64 * 2**20
"""Bytes of the longest body that is read; a completion is far below it."""

LONGEST_SAID = 4096
"""Bytes of an error's body that are looked at."""


class EndpointUnavailable(EngineError):
    """The server did not answer usefully within all retries."""


class EndpointRefused(EngineError):
    """The server refuses this request with `status`; asked again, it would again."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Retry(Exception):
    """One try failed in a way that another may not; `after` is the server's own wish in seconds."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Pace:
    """At most `per_minute` starts a minute, evenly spaced; None is no limit."""

    def __init__(self, per_minute: float | None):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        if not self._gap:
            return
        now = time.monotonic()
        start = max(self._next, now)
        self._next = start + self._gap
        await asyncio.sleep(start - now)


class JsonClient:
    """Posts JSON to paths below `url`, at most `concurrency` at once and `per_minute` tries a minute.

    Retries after 429, 5xx, broken connections, timeouts and bodies that are no JSON, waiting `backoff_s`, twice that,
    and so on with up to half as much again at random. Other statuses raise EndpointRefused at once, since the same
    request would fail again. counters: `<name>_http_retries`, `<name>_http_<status>`, `<name>_http_timeouts`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        concurrency: int,
        per_minute: float | None = None,
        api_key: str | None = None,
        counters: Counter[str] | None = None,
    ):
        parts = urlsplit(url)
        self.host = parts.netloc.rpartition("@")[2]
        self.counters = Counter[str]() if counters is None else counters
        self._secure, self._base = parts.scheme == "https", parts.path.rstrip("/")
        self._name, self._timeout, self._retries, self._backoff = name, timeout_s, retries, backoff_s
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._key = api_key
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix=f"{name}-http")
        self._room = asyncio.Semaphore(concurrency)
        self._pace = Pace(per_minute)
        self._local = threading.local()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The decoded answer. Raises EndpointUnavailable after all retries, EndpointRefused for a refused request."""
        data = json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            await self._pace.wait()
            try:
                async with self._room:
                    return await self._try(path, data)
            except _Retry as failure:
                reason, after = str(failure), failure.after
            if attempt == self._retries:
                break
            self.counters[f"{self._name}_http_retries"] += 1
            wait = self._backoff * 2**attempt * random.uniform(1.0, 1.5)
            await asyncio.sleep(min(LONGEST_WAIT_S, max(wait, after or 0.0)))
        raise EndpointUnavailable(f"{self._name}: {self.host}: {reason} ({self._retries + 1} tries)")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _try(self, path: str, data: bytes) -> Any:
        holder: list[http.client.HTTPConnection] = []
        call = asyncio.get_running_loop().run_in_executor(self._pool, self._exchange, path, data, holder)
        try:
            # a socket's own limit restarts with every byte; a server that drips must not hold a request for ever
            status, after, raw = await asyncio.wait_for(asyncio.shield(call), self._timeout)
        except TimeoutError:
            self.counters[f"{self._name}_http_timeouts"] += 1
            _cut(holder)
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise _Retry(f"no answer within {self._timeout} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(f"{type(error).__name__}: {error}") from None
        if status != 200:
            self.counters[f"{self._name}_http_{status}"] += 1
            said = " ".join(raw[:LONGEST_SAID].decode("utf-8", "replace").split())
            if self._key is not None:  # some servers repeat the key that they refuse
                said = said.replace(self._key, "***")
            said = said[:300]
            if status == 429 or status >= 500:
                raise _Retry(f"status {status}: {said}", after)
            raise EndpointRefused(f"{self._name}: {self.host} refuses with status {status}: {said}", status)
        try:
            return json.loads(raw)
        except ValueError:
            raise _Retry("the answer is no JSON") from None

    def _exchange(self, path: str, data: bytes, holder: list[Any]) -> tuple[int, float | None, bytes]:
        """In a worker thread: one request over this thread's connection, opened anew if it was closed meanwhile."""
        kept = getattr(self._local, "connection", None)
        self._local.connection = None
        connection = kept or self._connect()
        holder.append(connection)
        try:
            try:
                connection.request("POST", f"{self._base}{path}", data, self._headers)
                answer = connection.getresponse()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                if kept is None:
                    raise
                # the server closed an idle connection; that is no failure of this request
                connection.close()
                connection = self._connect()
                holder.append(connection)
                connection.request("POST", f"{self._base}{path}", data, self._headers)
                answer = connection.getresponse()
            raw = answer.read(LONGEST_ANSWER)
        except BaseException:
            connection.close()
            raise
        if answer.will_close:
            connection.close()
        else:
            self._local.connection = connection
        return answer.status, _seconds(answer.headers.get("Retry-After")), raw

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            return http.client.HTTPSConnection(self.host, timeout=self._timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(self.host, timeout=self._timeout)


def _cut(connections: list[http.client.HTTPConnection]) -> None:
    """Wakes a thread that waits on a socket, from outside."""
    for connection in connections:
        if connection.sock is not None:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already


def _seconds(header: str | None) -> float | None:
    """Retry-After as seconds from now; a date or nonsense is None."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
