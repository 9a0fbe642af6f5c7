"""The copy plan: which slice of which published tensor lands where in an engine's parameter storages, as plain data.

Offsets, shapes and strides count elements; a target offset counts from the start of the parameter's storage. One plan
describes one tensor-parallel rank.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from advgame.publish.cover import cover

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ALIGNMENT = 256
"""Bytes that every storage in an arena starts on a multiple of."""


@dataclass(frozen=True)
class Source:
    """A tensor of the trainer, whole and contiguous."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A strided box inside a source or a storage."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last element touched."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        expected = 1
        for n, s in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if n != 1 and s != expected:
                return False
            expected *= n
        return True


@dataclass(frozen=True)
class Copy:
    """`target[into] = source[taken]`, converting to the storage's dtype; both regions have the same shape."""

    source: str
    taken: Region
    target: str
    into: Region


@dataclass(frozen=True)
class Fill:
    """A region that loading sets to a constant (vocabulary padding) and that no publish touches."""

    target: str
    into: Region
    value: float


@dataclass(frozen=True)
class Storage:
    """Memory of one or more engine parameters (tied ones share it). `name` is the first parameter's."""

    name: str
    dtype: str
    elements: int
    parameters: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """All copies of one rank of one model, in the order in which the engine's loader makes them."""

    model: str
    rank: int
    world_size: int
    sources: tuple[Source, ...]
    storages: tuple[Storage, ...]
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]

    @property
    def hash(self) -> str:
        """Hex digest of everything above: equal plans of trainer and engine have equal hashes."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def layout(self) -> tuple[dict[str, int], int]:
        """(byte offset of every storage in one arena, bytes of the arena)."""
        offsets, end = {}, 0
        for storage in self.storages:
            offsets[storage.name] = end
            end += -(-storage.bytes // ALIGNMENT) * ALIGNMENT
        return offsets, end

    def lines(self) -> list[str]:
        """The plan for people: a heading, then a line a copy."""
        _, size = self.layout()
        heading = (
            f"{self.model}, rank {self.rank} of {self.world_size}: {len(self.sources)} sources, {len(self.copies)} "
            f"copies, {len(self.fills)} fills, {len(self.storages)} storages, {size / 2**20:.2f} MiB, plan {self.hash}"
        )
        lines = [heading]
        for storage in self.storages:
            also = ", ".join(storage.parameters[1:])
            lines.append(
                f"storage {storage.name} {storage.dtype} {storage.elements}" + (f" (also {also})" if also else "")
            )
        shapes = {source.name: source.shape for source in self.sources}
        for copy in self.copies:
            whole = "" if is_whole(copy, shapes[copy.source]) else f" {_box(copy.taken)}"
            lines.append(f"copy {copy.source}{whole} -> {copy.target} {_box(copy.into)}")
        lines += [f"fill {fill.target} {_box(fill.into)} = {fill.value:g}" for fill in self.fills]
        return lines

    def diff(self, other: Plan) -> list[str]:
        """What differs, one line each: `-` only here, `+` only there. Empty for equal plans."""
        mine, theirs = self.lines()[1:], other.lines()[1:]
        lines = [
            f"{name}: {getattr(self, name)} != {getattr(other, name)}"
            for name in ("model", "rank", "world_size")
            if getattr(self, name) != getattr(other, name)
        ]
        lines += [f"- {line}" for line in mine if line not in set(theirs)]
        lines += [f"+ {line}" for line in theirs if line not in set(mine)]
        if not lines and self != other:
            lines.append("the same copies in another order, or other sources")
        return lines

    def to_tree(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON and for vLLM's calls."""
        tree: dict[str, Any] = asdict(self)
        return tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Plan:
        return cls(
            tree["model"],
            tree["rank"],
            tree["world_size"],
            tuple(Source(s["name"], tuple(s["shape"])) for s in tree["sources"]),
            tuple(Storage(s["name"], s["dtype"], s["elements"], tuple(s["parameters"])) for s in tree["storages"]),
            tuple(Copy(c["source"], _region(c["taken"]), c["target"], _region(c["into"])) for c in tree["copies"]),
            tuple(Fill(f["target"], _region(f["into"]), f["value"]) for f in tree["fills"]),
        )


def is_whole(copy: Copy, shape: Sequence[int]) -> bool:
    """Whether a copy takes its whole source, in the source's own order."""
    return copy.taken.offset == 0 and copy.taken.size == prod(shape) and copy.taken.contiguous


def source_problems(plans: Sequence[Plan]) -> list[str]:
    """Sources that the ranks of one engine, taken together, have no place for, in whole or in part, or that one rank
    places twice."""
    found = []
    everywhere: dict[str, list[Region]] = defaultdict(list)
    for plan in plans:
        taken: dict[str, list[Region]] = defaultdict(list)
        for copy in plan.copies:
            taken[copy.source].append(copy.taken)
        twice = [source.name for source in plan.sources if cover(taken[source.name], prod(source.shape))[1]]
        found += [f"{name} is copied to more than one place (duplicated untied head?)" for name in twice]
        for name, regions in taken.items():
            everywhere[name] += regions
    for source in plans[0].sources:
        if not everywhere[source.name]:
            found.append(f"{source.name} goes nowhere: the engine's model has no place for it")
        elif left := cover(everywhere[source.name], prod(source.shape))[0]:
            found.append(f"{left} elements of {source.name} go nowhere: no rank takes them")
    return list(dict.fromkeys(found))


def problems(plan: Plan) -> list[str]:
    """Why these copies would not leave one rank with exactly the trainer's weights; empty if they would."""
    found = source_problems([plan]) if plan.world_size == 1 else []
    for storage in plan.storages:
        regions = [c.into for c in plan.copies if c.target == storage.name]
        regions += [f.into for f in plan.fills if f.target == storage.name]
        if any(region.end > storage.elements for region in regions):
            found.append(f"a copy into {storage.name} ends beyond its {storage.elements} elements")
            continue
        bare, again = cover(regions, storage.elements)
        if bare:
            found.append(f"{bare} elements of {storage.name} come from no source")
        if again:
            found.append(f"{again} elements of {storage.name} are written more than once")
    return found


def sources_of(named: Iterable[tuple[str, Any]]) -> tuple[Source, ...]:
    """Sources from (name, tensor) pairs, such as `model.named_parameters()` (tied parameters come once)."""
    return tuple(Source(name, tuple(tensor.shape)) for name, tensor in named)


def _region(tree: Mapping[str, Any]) -> Region:
    return Region(tree["offset"], tuple(tree["shape"]), tuple(tree["stride"]))


def _box(region: Region) -> str:
    strides = "" if region.contiguous else f" strides {'x'.join(map(str, region.stride))}"
    return f"[{region.offset}: {'x'.join(map(str, region.shape)) or 'scalar'}{strides}]"
