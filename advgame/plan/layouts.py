"""Ways to split GPUs among trainer, Attacker, Defender and judge, and what each would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from advgame.plan.assumptions import GIB, Assumptions, Hardware
from advgame.plan.costs import TrainCost, TrainerFit, engine_cost, publish_seconds, train_cost, trainer_fit
from advgame.plan.shapes import ModelShape
from advgame.plan.simulate import PlayResult, Replica, Simulation
from advgame.plan.workload import TreeDraw, Workload

TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """GPUs by role, `judge_tp` of them a judge replica. `shared`: everything on one GPU, its memory split by need."""

    trainer: int
    attacker: int
    defender: int
    judges: int
    judge_tp: int = 1
    shared: bool = False

    @property
    def gpus(self) -> int:
        return 1 if self.shared else self.trainer + self.attacker + self.defender + self.judges * self.judge_tp

    def __str__(self) -> str:
        if self.shared:
            return "1 shared"
        judge = f"{self.judges}" if self.judge_tp == 1 else f"{self.judges}x{self.judge_tp}"
        return f"{self.trainer}+{self.attacker}+{self.defender}+{judge}"


@dataclass(frozen=True)
class Cast:
    """Whose shapes play; None: no model is asked (no Attacker, a rule judge)."""

    attacker: ModelShape | None
    defender: ModelShape
    judge: ModelShape | None

    @property
    def players(self) -> list[ModelShape]:
        return [shape for shape in (self.attacker, self.defender) if shape is not None]


@dataclass(frozen=True)
class Estimate:
    """One layout's step: seconds by stage, memory, energy."""

    layout: Layout
    fit: TrainerFit
    play: PlayResult
    train: TrainCost
    publish: float
    seconds: float  # of a step, overlap counted
    watts: float  # of all GPUs and what hangs on them
    memory: dict[str, float]  # GiB on a GPU of each role

    @property
    def steps_per_hour(self) -> float:
        return 3600.0 / self.seconds

    def energy(self, steps: int) -> float:
        """kWh of so many steps."""
        return self.watts * self.seconds * steps / 3.6e6


def candidates(gpus: int, cast: Cast, per_node: int, judge_tp: int) -> Iterator[Layout]:
    """All splits with a trainer of 1, 2, 4, 8 … ranks and judges of the given tensor-parallel size."""
    if gpus == 1:
        yield Layout(1, 1, 1, 1, 1, shared=True)
        return
    trainer = 1
    while trainer < gpus:
        rest = gpus - trainer
        for attacker in _shares(rest) if cast.attacker else (0,):
            for defender in _shares(rest - attacker):
                left = rest - attacker - defender
                if cast.judge is None:
                    if left == 0:
                        yield Layout(trainer, attacker, defender, 0)
                elif left >= judge_tp and left % judge_tp == 0:
                    yield Layout(trainer, attacker, defender, left // judge_tp, judge_tp)
        trainer *= 2


def _shares(rest: int) -> list[int]:
    """1, 2, 3, 4, then every sixteenth of what there is."""
    return sorted({n for n in (1, 2, 3, 4, *range(0, rest + 1, max(1, rest // 16))) if 0 < n <= rest})


def smallest_tp(shape: ModelShape | None, tokens: float, hardware: Hardware, assumed: Assumptions) -> int:
    """The least GPUs that hold a replica with room for at least 8 completions; 0 if eight GPUs do not."""
    if shape is None:
        return 1
    for gpus in TENSOR_PARALLEL:
        cost = engine_cost(shape, gpus, hardware, assumed, tokens)
        if cost is not None and cost.most >= 8:
            return gpus
    return 0


def estimate(
    layout: Layout, cast: Cast, work: Workload, trees: list[TreeDraw], *, ahead: bool, reference_pass: bool,
    micro_tokens: int, hardware: Hardware, assumed: Assumptions,
) -> Estimate | None:  # fmt: skip
    """Plays one step on the layout; None if something does not fit into memory."""
    shares = _shared_shares(cast) if layout.shared else dict.fromkeys(("trainer", "attacker", "defender", "judge"), 1.0)
    fit = trainer_fit(cast.players, layout.trainer, micro_tokens, hardware, assumed, shares["trainer"])
    if fit is None:
        return None
    tokens = mean_tokens(work)
    replicas: dict[str, list[Replica]] = {}
    memory = {"trainer": fit.total / GIB}
    gpu = 0
    for role, shape, count, size in (
        ("attacker", cast.attacker, layout.attacker, 1),
        ("defender", cast.defender, layout.defender, 1),
        ("judge", cast.judge, layout.judges, layout.judge_tp),
    ):
        if shape is None or count == 0:
            replicas[role] = []
            continue
        cost = engine_cost(shape, size, hardware, assumed, tokens[role], shares[role])
        if cost is None:
            return None
        memory[role] = (2.0 * shape.parameters + cost.most * tokens[role] * shape.kv_bytes()) / size / GIB
        replicas[role] = [Replica(role, cost, 0 if layout.shared else gpu + i) for i in range(count)]
        gpu += count
    play = Simulation(replicas, assumed.driver_request.value).play(trees)
    train = train_cost(
        cast.attacker, cast.defender, work, layout.trainer, fit.stage, micro_tokens, reference_pass, hardware, assumed
    )
    same_node = layout.gpus <= hardware.gpus_per_node.value
    publish = publish_seconds(cast.players, layout.trainer, same_node, layout.shared, hardware, assumed)
    overlap = ahead and not layout.shared
    seconds = (max(play.seconds, train.seconds) if overlap else play.seconds + train.seconds) + publish
    watts = _watts(layout, play, train, seconds, hardware, assumed)
    return Estimate(layout, fit, play, train, publish, seconds, watts, memory)


def mean_tokens(work: Workload) -> dict[str, float]:
    """Prompt and completion of a role's mean request."""
    a = work.assumed
    instruction = a.instruction_tokens.value + a.seed_tokens.value
    return {
        "attacker": instruction + work.attack.mean,
        "defender": work.attack.mean * a.prompt_share.value + work.response.mean,
        "judge": a.rubric_tokens.value + 2 * work.response.mean + work.verdict.mean,
    }


def _shared_shares(cast: Cast) -> dict[str, float]:
    """Memory of the one GPU by need: 20 bytes a parameter in training, 2 in an engine, doubled for its cache."""
    need = {
        "trainer": 20.0 * sum(s.parameters for s in cast.players),
        "attacker": 4.0 * (cast.attacker.parameters if cast.attacker else 0),
        "defender": 4.0 * cast.defender.parameters,
        "judge": 4.0 * (cast.judge.parameters if cast.judge else 0),
    }
    total = sum(need.values())
    return {role: bytes_ / total for role, bytes_ in need.items()}


def _watts(
    layout: Layout, play: PlayResult, train: TrainCost, seconds: float, hardware: Hardware, assumed: Assumptions
) -> float:
    """Mean power of a step: each GPU between idle and full by its busy share, times the factor for all around it."""
    idle, full = hardware.idle_power.value, hardware.power.value

    def power(gpus: int, busy: float) -> float:
        return gpus * (idle + (full - idle) * min(1.0, busy))

    if layout.shared:
        busy = (max(play.busy.values(), default=0.0) * play.seconds + train.seconds) / seconds
        return power(1, busy) * assumed.overhead_power.value
    share = play.seconds / seconds
    total = power(layout.trainer, train.seconds / seconds)
    total += power(layout.attacker, play.busy.get("attacker", 0.0) * share)
    total += power(layout.defender, play.busy.get("defender", 0.0) * share)
    total += power(layout.judges * layout.judge_tp, play.busy.get("judge", 0.0) * share)
    return total * assumed.overhead_power.value


def best(
    gpus: int, cast: Cast, work: Workload, trees: list[TreeDraw], *, ahead: bool, reference_pass: bool,
    micro_tokens: int, hardware: Hardware, assumed: Assumptions, keep: int = 5,
) -> list[Estimate]:  # fmt: skip
    """The quickest layouts of `gpus` GPUs, best first; empty if nothing fits."""
    judge_tp = smallest_tp(cast.judge, mean_tokens(work)["judge"], hardware, assumed)
    if judge_tp == 0:
        return []
    found = []
    for layout in candidates(gpus, cast, int(hardware.gpus_per_node.value), judge_tp):
        one = estimate(
            layout, cast, work, trees, ahead=ahead, reference_pass=reference_pass, micro_tokens=micro_tokens,
            hardware=hardware, assumed=assumed,
        )  # fmt: skip
        if one is not None:
            found.append(one)
    return sorted(found, key=lambda e: e.seconds)[:keep]
