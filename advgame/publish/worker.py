"""The engine's side of publishing: vLLM's weight-transfer engine of our backend, and what the trainer calls besides.

Runs inside vLLM's worker processes. Nothing here is imported by the trainer's process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from advgame.errors import InputError
from advgame.publish import group as groups
from advgame.publish import plugin
from advgame.publish.adapter import Place, place_of, place_of_worker
from advgame.publish.arena import checksum, flat_view
from advgame.publish.binding import bind, checksums, compare, copied_checksums, flats_of, open_part
from advgame.publish.buckets import Layout, Unpacker
from advgame.publish.cuda_memory import device_id
from advgame.publish.loader import file_tensor
from advgame.publish.meeting import VARIABLE, Call
from advgame.publish.pieces import PieceReceiver, digest, messages_of
from advgame.publish.plan import Plan, Source
from advgame.publish.record import PlanRefused, record
from advgame.rollout import vllm_sockets

plugin.register()


class PublishEngine(WeightTransferEngine):
    """Built by vLLM right after its model is loaded, before it profiles, compiles or captures: the moment to move.

    If a trainer waits (`meeting.VARIABLE`), the parameters move into its memory, and a publish is then a write of the
    trainer and nothing here. None of vLLM's own update calls is used.
    """

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo

    def __init__(self, config: Any, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.plan: Plan | None = None
        self.flats: dict[str, Tensor] = {}
        self.groups: list[Any] = []
        self.unpacker: Unpacker | None = None
        self.pieces: PieceReceiver | None = None
        self.store: Any = None
        if VARIABLE in os.environ:
            self._move_in(place_of(rest))

    def _move_in(self, place: Place) -> None:
        call = Call(os.environ[VARIABLE])
        try:
            plan, refused = plan_of(place, call.model, call.sources)
            memory = call.answer(place.rank, place.world_size, device_id(place.device), plan, refused)
            if memory is None or plan is None:
                return
            try:
                part = open_part(memory, place.device)
            except (OSError, ValueError, RuntimeError, InputError) as error:
                call.settled([f"the trainer's memory cannot be opened: {' '.join(str(error).split())}"])
                return
            self.flats = bind(place.model, plan, part)
            if place.device.type == "cuda":
                torch.cuda.empty_cache()  # what the weights were loaded into
            self.plan = plan
            call.settled()
        finally:
            call.close()

    def init_transfer_engine(self, init_info: Any) -> None:
        """Not ours: workers are told by `PublishWorker`."""

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def finish_weight_update(self) -> None:
        """Nothing to finish."""

    def receive_weights(self, *_: Any, **__: Any) -> None:
        """Not ours either."""

    def shutdown(self) -> None:
        """The trainer's memory is released with the parameters that live in it."""
        for group in self.groups:
            groups.leave(group)
        self.groups = []

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Demanded of subclasses by vLLM before 0.32."""


def plan_of(place: Place, model_name: str, sources: list[Source]) -> tuple[Plan | None, list[str]]:
    """This rank's plan, or the reasons why there is none."""
    if place.refused:
        return None, list(place.refused)
    try:
        return record(
            place.model, sources, name=model_name, dtype=place.dtype, rank=place.rank, world_size=place.world_size
        ), []
    except PlanRefused as refusal:
        return None, list(refusal.reasons)


class PublishWorker:
    """vLLM's `worker_extension_cls`: methods that the trainer calls with `collective_rpc`."""

    def advgame_guard(self, parent: int) -> int:
        """Leaves Ctrl-C to the trainer, which finishes its step, and dies with it; writes down what it shares. Returns
        the process id."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        plugin.die_with_parent(parent)
        vllm_sockets.note_shared()
        return os.getpid()

    def advgame_plan(self, model_name: str, sources: list[Any]) -> dict[str, Any]:
        """{"plan": tree} or {"refused": [reasons]} for tensors of these (name, shape)."""
        engine = _engine_of(self)
        plan, refused = engine.plan, list[str]()
        if plan is None:
            wanted = [Source(name, tuple(shape)) for name, shape in sources]
            plan, refused = plan_of(place_of_worker(self), model_name, wanted)
            engine.plan = plan
        return {"refused": refused} if plan is None else {"plan": plan.to_tree()}

    def advgame_device(self) -> str:
        """The GPU's own name, or "cpu"."""
        return device_id(place_of_worker(self).device)

    def advgame_verify(self, hashes: list[str], expected: list[dict[str, int]]) -> None:
        """Compares the plan and every storage with the trainer's (hashes, checksums, by rank). Raises RuntimeError."""
        place, plan = place_of_worker(self), _plan_of(self)
        check_hash(plan, hashes[place.rank])
        compare(checksums(place.model, plan), expected[place.rank])

    def advgame_join(self, how: dict[str, Any], layout: dict[str, Any]) -> None:
        """Joins the trainer's group; later buckets are laid out so."""
        engine, place = _engine_of(self), place_of_worker(self)
        engine.shutdown()
        store = groups.reach(how["host"], how["port"], how["seconds"])
        _join(engine, place, how, how["name"], store)
        _lay_out(engine, place, how, layout)

    def advgame_join_ranks(self, how: dict[str, Any], layout: dict[str, Any], held: list[list[Any]]) -> None:
        """Joins a group of each sending rank; held: by rank, the spans of the packed sources, in their order."""
        engine, place = _engine_of(self), place_of_worker(self)
        engine.shutdown()
        store = groups.reach(how["host"], how["port"], how["seconds"])
        groups.await_key(store, how["begin"], how["patience"])
        for sender in range(len(held)):
            _join(engine, place, how, f"{how['name']}/{sender}", store)
            groups.greet(engine.groups[-1], place.device, how["seconds"])
        unpacker = _lay_out(engine, place, how, layout)
        names = [one.name for one in unpacker.layout.packed]
        spans = [{name: (first, n) for name, (first, n) in zip(names, own, strict=True)} for own in held]
        messages = messages_of(unpacker.layout, spans, how["limit"])
        if digest(messages) != how["messages"]:
            raise RuntimeError("the ranks cut their shards into other messages than this engine expects")
        engine.store, engine.pieces = store, PieceReceiver(unpacker, messages, engine.groups)

    def advgame_receive_ranks(self, begin: str, patience: float, seconds: float, verify: bool) -> dict[str, int]:
        """What every rank sends once the key `begin` is set; with `verify` compares every place, and returns the
        checksums of what arrived."""
        engine = _engine_of(self)
        assert engine.pieces is not None, "advgame_join_ranks comes first"
        groups.await_key(engine.store, begin, patience)
        return engine.pieces.receive(seconds, verify=verify)

    def advgame_receive(self, seconds: float, expected: list[dict[str, int]] | None) -> None:
        """Receives all buckets and copies them to their places; with `expected` (by rank) compares every place."""
        engine, place = _engine_of(self), place_of_worker(self)
        unpacker = engine.unpacker
        (group,) = engine.groups
        assert unpacker is not None, "advgame_join comes first"
        with torch.no_grad():
            for number in range(len(unpacker.layout.bounds) - 1):
                groups.broadcast(group, unpacker.bucket(number), seconds)
                unpacker.unpack(number)
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        if expected is not None:
            compare(copied_checksums(_plan_of(self), engine.flats), expected[place.rank])

    def advgame_synchronize(self) -> None:
        """Waits until the device is idle."""
        place = place_of_worker(self)
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)

    def advgame_load(self, path: str, size: int, entries: list[Any], expected: dict[str, int] | None = None) -> None:
        """vLLM's own loader over tensors in a shared file; entries: (name, dtype, shape, byte offset).

        expected: checksums by name of what must be read. RuntimeError: something else was.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        arena, read = file_tensor(path, size), dict[str, int]()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape, offset in entries:
                elements = 1
                for n in shape:
                    elements *= n
                # the loader may keep what it is given until a layer is whole; the arena changes under it later
                own = flat_view(arena, offset, elements, getattr(torch, dtype)).view(*shape).clone()
                if expected is not None:
                    read[name] = checksum(own)
                yield name, own

        model, config = place_of_worker(self).model, self.vllm_config  # type: ignore[attr-defined]
        with set_current_vllm_config(config), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(tensors())  # type: ignore[operator]
            finalize_layerwise_reload(model, config.model_config)
        if expected is not None:
            compare(expected, read)

    def advgame_load_one(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        """One parameter through `load_weights`: how published systems do it; kept for comparison."""
        tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(*shape)
        with torch.no_grad():
            place_of_worker(self).model.load_weights(iter([(name, tensor)]))  # type: ignore[operator]

    def advgame_zero(self) -> None:
        """Sets every parameter to zero: a publish must then restore all of them."""
        with torch.no_grad():
            for parameter in place_of_worker(self).model.parameters():
                parameter.zero_()


def _engine_of(worker: Any) -> PublishEngine:
    engine: PublishEngine = worker.weight_transfer_engine
    return engine


def _join(engine: PublishEngine, place: Place, how: dict[str, Any], name: str, store: Any) -> None:
    engine.groups.append(
        groups.join(
            store, name, 1 + place.rank, how["size"], device=place.device, host=how["host"], seconds=how["seconds"]
        )
    )


def _lay_out(engine: PublishEngine, place: Place, how: dict[str, Any], layout: dict[str, Any]) -> Unpacker:
    assert engine.plan is not None, "advgame_plan comes first"
    check_hash(engine.plan, how["plans"][place.rank])
    engine.flats = engine.flats or flats_of(place.model, engine.plan)
    engine.unpacker = Unpacker(Layout.from_tree(layout), engine.plan, engine.flats, place.device)
    return engine.unpacker


def check_hash(plan: Plan, theirs: str) -> None:
    """RuntimeError if the trainer writes by another plan."""
    if plan.hash != theirs:
        raise RuntimeError(f"the trainer writes by plan {theirs}, this engine's is {plan.hash}")


def _plan_of(worker: Any) -> Plan:
    plan = _engine_of(worker).plan
    assert plan is not None, "advgame_plan comes first"
    return plan
