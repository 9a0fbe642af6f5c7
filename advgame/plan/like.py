"""The simulation told by measured runs: what another layout of the same game would take on the machine they ran on.

A run's folder holds its trees with every length, its seconds by stage, and the seconds of all requests by role. Those
fix what is assumed elsewhere: seconds of a decode step and of each completion in it, of a prefill, of the driver. The
driver's are processor time over requests; the others are searched for, until the simulation of the measured steps takes
as long as they did. Learning and the rest are straight lines in the number of trees.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advgame.config import Config, load_config
from advgame.errors import InputError
from advgame.game.tree import Attack, Category, PairScore, Sample, Tree
from advgame.plan.simulate import EngineCost, PlayResult, Replica, Simulation
from advgame.plan.workload import ROLES, Branch, Request, TreeDraw
from advgame.run import names
from advgame.run.engines import replicas_of
from advgame.run.recorder import read_metrics, read_trees

WARM = 2
"""First steps that are left out: caches are cold, and kernels are chosen."""
FITTED = 3
"""Steps of each run that are simulated for a try of the search."""
PLAYED = 6
"""Steps that are simulated for a prediction."""
STAGES = ("play", "learn", "publish", "rest")


@dataclass(frozen=True)
class Costs:
    """Seconds of a decode step, of each completion in it, and of a prefill (its engine stands still); of the driver for
    a request."""

    step: float
    row: float
    prefill: float
    driver: float


@dataclass(frozen=True)
class Step:
    """One measured step. waited: seconds of all requests by role."""

    trees: list[TreeDraw]
    categories: list[Category]
    seconds: dict[str, float]
    waited: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """A run: what placed it (`placed`), its replicas and cores, its steps, processor seconds of the driver a request,
    and seconds of a publish into one engine: (all of it, the part that replicas take in turns)."""

    path: Path
    placed: str
    replicas: dict[str, int]
    cores: int
    most: int
    steps: list[Step]
    driver: float
    publishes: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Prediction:
    """Seconds by stage of one step; their sum is the step's."""

    seconds: dict[str, float]
    driver: float
    busy: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def read_run(path: Path, cores: int | None = None) -> Measured:
    """The facts of a finished run whose models were all sampled by vLLM. InputError names what it lacks."""
    if not (path / "config.yaml").is_file():
        raise InputError(f"--like {path}: not a run folder (no config.yaml)")
    config = load_config(path / "config.yaml")
    check(config, f"--like {path}")
    rows = {row["step"]: row for row in read_metrics(path / "metrics.jsonl") if names.STEP_SECONDS in row}
    starts = json.loads((path / "environment.json").read_text(encoding="utf-8"))["starts"]
    measured = sorted(rows)[WARM:]
    if len(measured) < 2:
        raise InputError(f"--like {path}: {len(rows)} steps are too few; give a run of {WARM + 2} or more")
    steps, drivers = [], []
    for number in measured:
        row = rows[number]
        trees = [one.tree for one in read_trees(path / "trees" / f"{number:06d}.jsonl.gz")]
        verdict = round(row.get("play/judge_tokens", 0))
        draws = [draw_of(tree, verdict, config) for tree in trees]
        known = {stage: row[names.stage_seconds(stage)] for stage in ("play", "learn", "publish")}
        rest = row[names.STEP_SECONDS] - sum(known.values()) - row.get(names.stage_seconds("validate"), 0.0)
        waited = {role: row[key] for role in ROLES if (key := names.request_seconds(role)) in row}
        steps.append(Step(draws, [tree.seed.category for tree in trees], known | {"rest": rest}, waited))
        asked = sum(1 for draw in draws for _ in draw.requests())
        busy = row[names.PROCESS_SECONDS] - known["learn"] - known["publish"] - rest
        drivers.append(max(0.0, busy) / max(1, asked))
    parts = ("quiesce", "write", "deliver", "reset", "stamp", "resume")
    publishes = {}
    for name in replicas_of(config):
        if all(f"publish/{name}/{part}_ms" in rows[measured[-1]] for part in parts):
            times = [[rows[n][f"publish/{name}/{part}_ms"] / 1e3 for part in parts] for n in measured]
            publishes[name] = statistics.median(map(sum, times)), statistics.median(each[1] for each in times)
    return Measured(
        path, placed(config), replicas_of(config), cores or starts[-1]["cpu_count"],
        config.rollout.vllm.max_sequences, steps, statistics.median(drivers), publishes,
    )  # fmt: skip


def placed(config: Config) -> str:
    """Where engines and trainer run: costs measured there hold nowhere else."""
    if (ranks := config.cluster.trainer_ranks) is not None:
        return f"{config.cluster.placement}, {ranks} trainer ranks"
    return config.cluster.placement


def check(config: Config, source: str) -> None:
    """InputError for a game whose steps this cannot describe."""
    if config.rollout.engine != "vllm" or (config.judge.kind == "llm" and config.judge.engine == "transformers"):
        raise InputError(f"{source}: rollout.engine: only vLLM's engines are simulated; play with vllm")
    if config.judge.endpoint is not None:
        raise InputError(f"{source}: judge.endpoint: a server's own time is not known; judge by an engine or a rule")
    if config.run.ahead or config.run.carry_over:
        raise InputError(f"{source}: run.ahead, run.carry_over: steps that overlap are not simulated; set both to 0")


def draw_of(tree: Tree, verdict: int, config: Config) -> TreeDraw:
    """A recorded tree as requests; every verdict was `verdict` tokens long, 0: no engine gave it."""
    times = config.judge.samples * (2 if config.judge.swap and config.judge.mode == "pairwise" else 1)

    def verdicts(given: Sequence[PairScore]) -> tuple[Request, ...]:
        return tuple(Request("judge", 0, verdict) for _ in given for _ in range(times)) if verdict else ()

    def branch(attack: Attack) -> Branch:
        made = attack.sample
        faithful = (
            Request("judge", 0, verdict) if verdict and attack.prompt and made and attack.faithful is not None else None
        )
        answers = tuple(request_of("defender", r.sample) for r in attack.responses if r.sample is not None)
        return Branch(request_of("attacker", made) if made else None, faithful, answers, verdicts(attack.verdicts))

    return TreeDraw(tuple(map(branch, tree.attacks)), verdicts(tree.verdicts))


def request_of(role: str, sample: Sample) -> Request:
    return Request(role, len(sample.prompt_ids), len(sample.token_ids))


def simulate(trees: Sequence[TreeDraw], costs: Costs, replicas: Mapping[str, int], cores: int, most: int) -> PlayResult:
    """One batch on a machine of so many cores. replicas: by engine; `shared` plays both roles."""
    cost = EngineCost(lambda active, _: costs.step + costs.row * active, lambda *_: costs.prefill, most)
    engines = {name: [Replica(name, cost, 0) for _ in range(count)] for name, count in replicas.items()}
    by_role = {role: engines.get(role) or engines.get("shared", []) for role in ROLES}
    if not engines.get("judge"):
        by_role["judge"] = []
    return Simulation(by_role, costs.driver, cores).play(trees)


def fit(runs: Sequence[Measured]) -> tuple[Costs, float]:
    """The costs with which the simulation is nearest to the runs, and how far it is off: the root mean square of the
    logarithms of (simulated over measured) play, and of the requests' seconds, which count half."""
    driver = statistics.median(run.driver for run in runs)
    chosen = [(run, step) for run in runs for step in typical(run.steps)]

    def off(tried: tuple[float, float, float]) -> float:
        total = weight = 0.0
        for run, step in chosen:
            made = simulate(step.trees, Costs(*tried, driver), run.replicas, run.cores, run.most)
            total += math.log(made.seconds / step.seconds["play"]) ** 2
            weight += 1.0
            for role, seconds in step.waited.items():
                if seconds > 0 and made.waited.get(role, 0.0) > 0:
                    total += 0.5 * math.log(made.waited[role] / seconds) ** 2
                    weight += 0.5
        return math.sqrt(total / weight)

    best = (5e-3, 2e-4, 1e-3)
    error, reach = off(best), 2.0
    while reach > 1.02:
        # one number at a time, up and down, by ever smaller factors
        for place in range(len(best)):
            for factor in (reach, 1 / reach):
                tried = (*best[:place], best[place] * factor, *best[place + 1 :])
                if (found := off(tried)) < error:  # type: ignore[arg-type]
                    best, error = tried, found  # type: ignore[assignment]
                    break
            else:
                continue
            break
        else:
            reach = math.sqrt(reach)
    return Costs(*best, driver), error


def typical(steps: Sequence[Step]) -> list[Step]:
    """The FITTED steps whose play was nearest to the median: what disturbed the others is no part of the machine."""
    middle = statistics.median(step.seconds["play"] for step in steps)
    return sorted(steps, key=lambda step: abs(step.seconds["play"] - middle))[:FITTED]


def predict(config: Config, runs: Sequence[Measured], costs: Costs, seed: int = 0) -> Prediction:
    """A step of `config` on the machine of `runs`, with trees drawn from theirs."""
    source, replicas = random.Random(seed), replicas_of(config)
    pools: dict[Category, list[TreeDraw]] = {category: [] for category in Category}
    for run in runs:
        for step in run.steps:
            for tree, category in zip(step.trees, step.categories, strict=True):
                pools[category].append(tree)
    played = []
    for _ in range(PLAYED):
        trees = [
            source.choice(pools[category])
            for category, count in ((Category.HARMFUL, config.data.harmful), (Category.BENIGN, config.data.benign))
            for _ in range(count)
        ]
        most = config.rollout.vllm.max_sequences
        played.append(simulate(trees, costs, replicas, runs[0].cores, most))
    trees_a_step = config.data.harmful + config.data.benign
    seconds = {"play": statistics.mean(one.seconds for one in played)}
    for stage in ("learn", "rest"):
        points = [(len(run.steps[0].trees), seconds_of(run, stage)) for run in runs]
        seconds[stage] = line(points, trees_a_step)
    seconds["publish"] = publish_seconds(replicas, runs)
    busy = {role: statistics.mean(one.busy[role] for one in played) for role in ROLES if played[0].busy.get(role)}
    return Prediction(
        {stage: seconds[stage] for stage in STAGES}, statistics.mean(one.driver for one in played), busy
    )  # fmt: skip


def seconds_of(run: Measured, stage: str) -> float:
    """The median over its steps."""
    return statistics.median(step.seconds[stage] for step in run.steps)


def line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Least squares through the points; where they all have the same abscissa, through the origin and their mean."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(set(xs)) == 1:
        return statistics.mean(ys) * at / xs[0]
    slope, start = statistics.linear_regression(xs, ys)
    return max(0.0, start + slope * at)


def publish_seconds(replicas: Mapping[str, int], runs: Sequence[Measured]) -> float:
    """Replicas are written one after another; everything else of a publish they do at once."""
    total = 0.0
    for name, count in replicas.items():
        known = [run.publishes[name] for run in runs if name in run.publishes]
        if known:
            whole, written = (statistics.mean(part) for part in zip(*known, strict=True))
            total += whole - written + count * written
    return total
