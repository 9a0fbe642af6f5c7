"""What a step cost: seconds by stage and by engine, and trees an hour of the whole step."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from advgame.rollout.engine import Engine
from advgame.rollout.meter import Meter
from advgame.rollout.replicas import ReplicaEngine
from advgame.run import names
from advgame.run.energy import JOULES_PER_KWH

SLOW = 2.0
"""Times as slow as the others, from which on a replica is told of."""


class Clock:
    """Seconds by stage of one step, from its making."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started


def step_effort(
    clock: Clock, meters: Mapping[str, Meter], played: tuple[float, int], trees: int, game_seconds: float
) -> dict[str, float]:
    """Metrics of one step's cost; takes the meters.

    played: seconds with trees in flight and trees that ended, as `Plays.take` gives them. trees: those learned from.
    game_seconds: wall time from the wait for the trees to the end of the publish. What play, learning and publishing
    took above that was hidden by overlap. Evaluation counts in none of these.
    """
    clock.seconds["play"] = played[0]
    stages = [clock.seconds.get(stage, 0.0) for stage in ("play", "learn", "publish")]
    total = clock.total
    values = {names.stage_seconds(stage): seconds for stage, seconds in clock.seconds.items()}
    values[names.STEP_SECONDS] = total
    values[names.HIDDEN_SECONDS] = max(0.0, sum(stages) - game_seconds)
    values[names.TREES_PER_HOUR] = 3600 * trees / (total - clock.seconds.get("validate", 0.0))
    busy, ended = played
    if ended and busy > 0:
        values[names.TREES_PER_SECOND] = ended / busy
    for role, meter in meters.items():
        busy, summed = meter.take()
        values[names.engine_seconds(role)] = busy
        values[names.request_seconds(role)] = summed
    if (share := judge_share(values)) is not None:
        values[names.JUDGE_SHARE] = share
    return values


class Replicas:
    """What every replica did, step by step; `note` is told of one that has become slow."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._slow: set[tuple[str, int]] = set()

    def take(self, engines: Iterable[Engine], counters: Counter[str]) -> dict[str, float]:
        """Metrics of the step; counts `<name>_slow`, once for each replica that is SLOW times as slow as the others
        (their median)."""
        values: dict[str, float] = {}
        for engine in engines:
            if not isinstance(engine, ReplicaEngine):
                continue
            shares = engine.take_shares()
            for number, share in enumerate(shares):
                values[names.replica_requests(engine.name, number)] = share.requests
                values[names.replica_slowness(engine.name, number)] = share.slowness
                slower = share.slowness / statistics.median(o.slowness for o in shares if o is not share)
                if slower > SLOW:
                    counters[f"{engine.name}_slow"] += 1
                    if (engine.name, number) not in self._slow:
                        self._note(
                            f"{engine.name}: replica {number} is {slower:.1f} x as slow as the others; it gets less"
                        )
                    self._slow.add((engine.name, number))
                else:
                    self._slow.discard((engine.name, number))
        return values


def judge_share(seconds: Mapping[str, float]) -> float | None:
    """The judge's part of all engine-seconds; None where no engine judges."""
    judge = seconds.get(names.engine_seconds("judge"))
    everyone = sum(seconds.get(names.engine_seconds(role), 0.0) for role in (*names.ROLES, "judge"))
    return judge / everyone if judge is not None and everyone > 0 else None


class Totals:
    """Seconds, energy and trees over all steps of a run, for the summary; saved with checkpoints."""

    def __init__(self, saved: Mapping[str, float] | None = None) -> None:
        self.sums: Counter[str] = Counter(saved or {})

    def add(self, values: Mapping[str, float], trees: int) -> None:
        for key, value in values.items():
            energy = key.startswith(names.ENERGY_PREFIX) and key.endswith(names.ENERGY_SUMS)
            if energy or key.startswith("seconds/"):
                self.sums[key] += value  # type: ignore[assignment]  # a Counter of floats
        self.sums["trees"] += trees

    def summary(self) -> dict[str, Any]:
        """Trees an hour (evaluation left out), seconds by stage, engine-seconds by role, the judge's share, energy."""
        playing = self.sums[names.STEP_SECONDS] - self.sums[names.stage_seconds("validate")]
        stages = (*names.STAGES, "hidden")
        spent = {k: v for k, v in self.sums.items() if k.startswith(names.ENERGY_PREFIX)}
        energy = {k.removeprefix(names.ENERGY_PREFIX): v for k, v in spent.items()}
        roles = [role for role in (*names.ROLES, "judge") if names.engine_seconds(role) in self.sums]
        return {
            "trees_per_hour": 3600 * self.sums["trees"] / playing if playing > 0 else None,
            "stage_seconds": {stage: self.sums[names.stage_seconds(stage)] for stage in stages},
            "engine_seconds": {role: self.sums[names.engine_seconds(role)] for role in roles},
            "request_seconds": {role: self.sums[names.request_seconds(role)] for role in roles},
            "judge_share": judge_share(self.sums),
            "energy": energy,
        }

    def line(self) -> str:
        """The summary in one line of text."""
        summary = self.summary()
        parts = [] if summary["trees_per_hour"] is None else [f"{summary['trees_per_hour']:.0f} trees an hour"]
        if engines := summary["engine_seconds"]:
            parts.append("engine-seconds " + ", ".join(f"{role} {seconds:.0f}" for role, seconds in engines.items()))
        if summary["judge_share"] is not None:
            parts.append(f"judge's share {summary['judge_share']:.0%}")
        used = summary["energy"]
        if "joules" in used:
            parts.append(f"energy {used['joules'] / JOULES_PER_KWH:.3g} kWh, {used['co2e_g'] / 1e3:.3g} kg CO2e")
        elif parts:
            parts.append("energy not available")
        return "; ".join(parts)
