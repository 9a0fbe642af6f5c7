"""What must be true of a run's folder however often the run was killed: `problems`, and `differences` from a twin."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from advgame.errors import InputError
from advgame.run import names
from advgame.run.checkpoint_files import checkpoint_problem, list_checkpoints
from advgame.run.recorder import read_trees, tree_files

PAIRS = re.compile(r"learn/\w+/pairs")
OWN = ("attempt", "time")
"""Of a row of metrics, beside the clock's: what differs between a run and its twin."""


def problems(run: Path, *, steps: int, trees: int, keep: int, tensorboard: bool = False) -> list[str]:
    """Everything that is wrong with the folder of a finished run of so many steps, of so many trees each."""
    found = [*_rows(run, steps), *_trees(run, steps, trees), *_checkpoints(run, steps, keep), *_leftovers(run)]
    if not (run / "summary.json").is_file():
        found.append("there is no summary.json")
    return found + (list(_drawn(run, steps)) if tensorboard else [])


def half_checkpoints(run: Path) -> list[str]:
    """Visible checkpoints that are not whole; for a run that was killed as well."""
    listed = [path for _, path in list_checkpoints(run / "checkpoints")]
    return [f"{path.name}: {problem}" for path in listed if (problem := checkpoint_problem(path)) is not None]


def _rows(run: Path, steps: int) -> Iterator[str]:
    rows = rows_of(run)
    # the final evaluation has a row of its own
    if [row["step"] for row in rows] != list(range(steps + 1)):
        counts = Counter(row["step"] for row in rows)
        odd = [step for step in range(steps + 1) if counts[step] != 1] + [step for step in counts if step > steps]
        yield f"metrics.jsonl: steps that are not there exactly once: {odd[:10] or 'none, but they are out of order'}"
    attempts = [row["attempt"] for row in rows]
    if attempts != sorted(attempts):
        yield "metrics.jsonl: an earlier attempt after a later one"


def _trees(run: Path, steps: int, trees: int) -> Iterator[str]:
    files = tree_files(run / "trees")
    if [file.name for file in files] != [f"{step:06d}.jsonl.gz" for step in range(steps)]:
        yield f"trees/: {len(files)} files of {steps} steps, or of others"
    seen: Counter[tuple[int, int]] = Counter()
    for file in files:
        try:
            read = [one.tree for one in read_trees(file)]
        except InputError as error:
            yield str(error)
            continue
        seen.update((tree.step, tree.index) for tree in read)
        if len(read) != trees:
            yield f"{file.name}: {len(read)} trees of {trees}"
    wanted = {(step, index) for step in range(steps) for index in range(trees)}
    odd = [place for place, times in seen.items() if times != 1 or place not in wanted]
    odd += sorted(wanted - seen.keys())
    if odd:
        yield f"trees that are not there exactly once, (step, index): {odd[:10]}"


def _checkpoints(run: Path, steps: int, keep: int) -> Iterator[str]:
    listed = list_checkpoints(run / "checkpoints")
    if not listed or listed[-1][0] != steps:
        yield f"checkpoints/: the last one is {listed[-1][1].name if listed else 'missing'}, not that of step {steps}"
    if len(listed) > keep:
        yield f"checkpoints/: {len(listed)} are kept, not {keep}"
    yield from half_checkpoints(run)


def _leftovers(run: Path) -> Iterator[str]:
    hidden = [path.relative_to(run).as_posix() for path in run.rglob(".*") if path.name != ".lock"]
    if hidden:
        yield f"files that a killed process left: {hidden[:10]}"


def _drawn(run: Path, steps: int) -> Iterator[str]:
    """TensorBoard shows every step once, whatever was played again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every resume
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    drawn = [event.step for event in events.Scalars(names.STEP_SECONDS)]
    if drawn != list(range(steps)):
        counts = Counter(drawn)
        yield f"tensorboard/: steps that are not drawn once: {[s for s in range(steps) if counts[s] != 1][:10]}"


def differences(run: Path, twin: Path) -> list[str]:
    """How two finished runs differ, clocks left out: rows, trees, and every tensor of the last checkpoint."""
    found = []
    for one, other in zip(rows_of(run), rows_of(twin), strict=False):
        ours, theirs = _without_clock(one), _without_clock(other)
        if ours != theirs:
            keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            found.append(f"metrics of step {one['step']}: {keys[:5]}")
    found += [
        f"trees of {file.name}"
        for file in tree_files(run / "trees")
        if [one.tree for one in read_trees(file)] != [one.tree for one in read_trees(twin / "trees" / file.name)]
    ]
    last, its = (list_checkpoints(path / "checkpoints")[-1][1] for path in (run, twin))
    for file in sorted(last.rglob("*.safetensors")):
        name = file.relative_to(last)
        ours, theirs = load_file(file), load_file(its / name)
        unequal = [key for key in ours.keys() | theirs.keys()
                   if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key])]  # fmt: skip
        if unequal:
            found.append(f"{last.name}/{name}: {len(unequal)} of {len(theirs)} tensors")
    return found


def played_again(run: Path) -> int:
    """Steps whose first play was set aside, once for each time."""
    return sum(1 for path in (run / "trees").iterdir() if ".attempt" in path.name)


def learned_from(run: Path) -> float:
    """Pairs of all steps and players."""
    return sum(value for row in rows_of(run) for key, value in row.items() if PAIRS.fullmatch(key))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl; ValueError for a line that is no JSON."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in OWN and not key.startswith(names.TIMED)}
