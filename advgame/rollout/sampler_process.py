"""A child process that samples batches, so that this one can learn meanwhile without sharing Python's lock.

The models' parameters lie in memory that both processes map: whoever publishes writes them here, between batches, and
the child reads the new ones in its next batch. Requests and completions travel through a pipe.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch import multiprocessing as torch_processes

from advgame import interrupts
from advgame.malloc import keep_freed_memory
from advgame.rollout.batch_sampler import BatchSampler, Complete, Completion
from advgame.rollout.engine import EngineDied, Request

ALIGNMENT = 64
"""Bytes; parameters begin on cache lines."""

RESTARTS = 3
"""Times that a dead child is replaced before its engines give up."""


FIRST = "first tokens"
"""What the child says when the first tokens of a batch are there, if it was asked to."""


@dataclass(frozen=True)
class Shared:
    """A sampler without its parameters (pickled), and where those lie: (name, first byte, type, shape) in `flat`."""

    stripped: bytes
    flat: Tensor
    layout: tuple[tuple[str, int, torch.dtype, torch.Size], ...]


class SamplerProcess:
    """Samples for every engine that was `add`ed before the start. One batch at a time, whoever asks.

    Starts on first use. A child that dies is replaced at the next batch, at most `RESTARTS` times; its weights are
    safe, since they live in shared memory. `restarts` counts.
    """

    def __init__(self) -> None:
        self.restarts = -1  # the first start is none
        self._samplers: list[Shared] = []
        self._process: Any = None
        self._pipe: Connection | None = None
        self._one = threading.Lock()
        self._users = 0

    def add(self, sampler: BatchSampler) -> Complete:
        """Moves the parameters of `sampler` into shared memory; returns its `sample`, computed in the child."""
        if self._process is not None:
            raise RuntimeError("the process has started; add every sampler before")
        index = len(self._samplers)
        self._samplers.append(share(sampler))
        self._users += 1
        return lambda requests, on_first: self._ask(index, requests, on_first)

    def start(self) -> None:
        """Returns when the child is there (seconds: it imports torch and transformers); nothing if it is."""
        with self._one:
            self._started()

    def leave(self) -> None:
        """One engine less; the last one ends the child, which others may be waiting for until then."""
        self._users -= 1
        if self._users <= 0:
            self.close()

    def close(self) -> None:
        """Ends the child."""
        if self._pipe is not None:
            self._pipe.close()  # it ends at the end of its input
            self._pipe = None
        if self._process is not None:
            self._process.join(5)
            self._process.kill()
            self._process = None

    def _started(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        if self.restarts >= RESTARTS:
            raise EngineDied(f"the sampling process has died {self.restarts + 1} times")
        self.restarts += 1
        # a fork would inherit locks of torch's threads
        spawn = torch_processes.get_context("spawn")
        ours, theirs = multiprocessing.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(theirs, self._samplers, torch.get_num_threads()), daemon=True, name="advgame-sampler"
        )
        with interrupts.held():
            self._process.start()
        theirs.close()
        try:
            ours.recv()
        except (EOFError, OSError):
            self._process.join()
            self._process = None
            raise EngineDied("the sampling process did not start; its own message is above") from None
        self._pipe = ours
        return ours

    def _ask(self, index: int, requests: Sequence[Request], on_first: Callable[[], None] | None) -> list[Completion]:
        """Waits for one batch. Raises what the sampler raised; EngineDied if the process ended."""
        with self._one:
            pipe = self._started()
            try:
                pipe.send((index, list(requests), on_first is not None))
                made = pipe.recv()
                if on_first is not None and made == FIRST:
                    on_first()
                    made = pipe.recv()
            except (EOFError, OSError):
                self.close()
                raise EngineDied("the sampling process ended") from None
            except BaseException:
                self.close()  # an answer that nobody takes would be the next batch's
                raise
        if isinstance(made, Exception):
            raise made
        answer: list[Completion] = made
        return answer


def share(sampler: BatchSampler) -> Shared:
    """Moves all parameters into one piece of shared memory: one file descriptor, however many there are."""
    parameters = dict(sampler.model.named_parameters())
    layout, end = [], 0
    for name, parameter in parameters.items():
        layout.append((name, end, parameter.dtype, parameter.shape))
        size = parameter.numel() * parameter.element_size()
        end += -(-size // ALIGNMENT) * ALIGNMENT
    flat = torch.empty(end, dtype=torch.uint8).share_memory_()
    views = views_of(flat, layout)
    for name, parameter in parameters.items():
        views[name].copy_(parameter.data)
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    stripped = pickle.dumps(sampler)
    _fill(sampler.model, views)
    return Shared(stripped, flat, tuple(layout))


def views_of(flat: Tensor, layout: Sequence[tuple[str, int, torch.dtype, torch.Size]]) -> dict[str, Tensor]:
    """The parameters that lie in `flat` (bytes), by name."""
    views = {}
    for name, first, dtype, shape in layout:
        size = shape.numel() * dtype.itemsize
        views[name] = flat[first : first + size].view(dtype).view(shape)
    return views


def _fill(model: nn.Module, views: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = views[name]


def _serve(pipe: Connection, shared: Sequence[Shared], threads: int) -> None:
    """The child: batches until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the parent's to handle
    keep_freed_memory()
    torch.set_num_threads(threads)
    samplers: list[BatchSampler] = []
    for one in shared:
        sampler: BatchSampler = pickle.loads(one.stripped)
        _fill(sampler.model, views_of(one.flat, one.layout))
        samplers.append(sampler)
    pipe.send("ready")
    while True:
        try:
            index, requests, tell = pipe.recv()
        except (EOFError, OSError):
            sys.exit(0)
        try:
            made: Any = samplers[index].sample(requests, partial(pipe.send, FIRST) if tell else None)
        except Exception as error:
            made = _plain(error)
        pipe.send(made)


def _plain(error: Exception) -> Exception:
    """`error`, or one that certainly travels: RuntimeErrors may be retried, others are bugs."""
    text = f"{type(error).__name__}: {error}"
    return RuntimeError(text) if isinstance(error, RuntimeError | ValueError) else TypeError(text)
