"""Seconds and bytes of a model on GPUs: decode steps, prefill, training, publishing, and what fits in memory."""

from __future__ import annotations

from dataclasses import dataclass

from advgame.plan.assumptions import GIB, Assumptions, Hardware
from advgame.plan.shapes import ModelShape
from advgame.plan.simulate import EngineCost
from advgame.plan.workload import Workload


def usable(hardware: Hardware, assumed: Assumptions) -> float:
    """Bytes of one GPU that may be planned with."""
    return hardware.memory.value * GIB * (1 - assumed.reserve.value)


def engine_cost(
    shape: ModelShape, gpus: int, hardware: Hardware, assumed: Assumptions, tokens: float, share: float = 1.0
) -> EngineCost | None:
    """A replica over `gpus` tensor-parallel GPUs with `share` of their memory; None if it does not fit.

    Decode step = max(bytes of weights and caches / bandwidth, FLOPs / matrix rate) + overheads. `tokens` is the mean
    length of prompt and completion, by which the cache bounds the completions at once (at most 256).
    """
    weights = 2.0 * shape.parameters
    room = usable(hardware, assumed) * gpus * share - weights
    if room <= 0:
        return None
    most = int(min(256, room / (shape.kv_bytes() * tokens)))
    if most < 1:
        return None
    bandwidth = hardware.bandwidth.value * assumed.decode_share.value * gpus
    matrix = hardware.matrix.value * gpus
    fixed = assumed.step_overhead.value
    if gpus > 1:
        fixed += 2 * shape.layers * assumed.reduce_latency.value
    read = 2.0 * (shape.body_parameters + shape.head_parameters)
    flops = 2.0 * (shape.body_parameters + shape.head_parameters)
    kv = float(shape.kv_bytes())

    def step(active: int, context: float) -> float:
        return max((read + active * context * kv) / bandwidth, flops * active / (matrix * 0.6)) + fixed

    def prefill(fresh: float, context: float) -> float:
        return shape.forward_flops(fresh, context, head_rows=1) / (matrix * assumed.prefill_share.value)

    return EngineCost(step, prefill, most)


@dataclass(frozen=True)
class TrainerFit:
    """The lowest ZeRO stage that fits, and bytes per GPU of what it holds."""

    stage: int
    states: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.head


def trainer_fit(
    shapes: list[ModelShape],
    ranks: int,
    micro_tokens: int,
    hardware: Hardware,
    assumed: Assumptions,
    share: float = 1.0,
) -> TrainerFit | None:
    """Both players on the same ranks. Bytes a parameter: fp32 master 4, gradient 4, Adam 8, EMA 4, bf16 copy 2.

    Stage 0 keeps 20 (the master is the player). Stage 1 shards master, Adam and EMA; stage 2 the gradient too; stage 3
    the bf16 copy too. Activations: one boundary a layer in bf16, one layer in full while it is recomputed; the head:
    one chunk of logits (1 GiB) and its fp32 gradient.
    """
    parameters = float(sum(shape.parameters for shape in shapes))
    widest = max(shapes, key=lambda s: s.layers * s.hidden)
    activations = micro_tokens * widest.hidden * (2.0 * widest.layers + assumed.activation_bytes.value)
    head = GIB + 4.0 * max(shape.head_parameters for shape in shapes)
    by_stage = {
        0: 20.0 * parameters,
        1: parameters * (2 + 4 + 16 / ranks),
        2: parameters * (2 + 20 / ranks),
        3: parameters * 22 / ranks,
    }
    for stage, states in by_stage.items():
        if stage and ranks == 1:
            break
        fit = TrainerFit(stage, states, activations, head)
        if fit.total <= usable(hardware, assumed) * share:
            return fit
    return None


@dataclass(frozen=True)
class TrainCost:
    """Seconds of one step's updates of both players, and what they are made of."""

    seconds: float
    flops: float
    tokens: float
    communication: float


def train_cost(
    attacker: ModelShape | None, defender: ModelShape, work: Workload, ranks: int, stage: int, micro_tokens: int,
    reference_pass: bool, hardware: Hardware, assumed: Assumptions,
) -> TrainCost:  # fmt: skip
    """Forward and backward of every pair (3 forwards, times the checkpoint factor), the reference's forward if made.

    Under ZeRO 3 the weights are gathered twice a micro-batch and gradients scattered once, beside the computation:
    the longer of the two counts.
    """
    factor = 3.0 * assumed.checkpoint_factor.value + (1.0 if reference_pass else 0.0)
    pairs = {
        "attacker": 0.0 if attacker is None else work.trees * assumed.pair_share.value,
        "defender": work.trees * work.attacks * assumed.valid_share.value * assumed.pair_share.value,
    }
    flops = tokens = bytes_moved = 0.0
    for name, shape in (("attacker", attacker), ("defender", defender)):
        if shape is None:
            continue
        if name == "attacker":
            prompt, reply = assumed.instruction_tokens.value + assumed.seed_tokens.value, work.attack.mean
        else:
            prompt, reply = work.attack.mean * assumed.prompt_share.value, work.response.mean
        each = prompt + 2 * reply
        flops += factor * pairs[name] * shape.forward_flops(each, each / 3, head_rows=2 * reply)
        tokens += pairs[name] * each
        batches = max(1.0, pairs[name] * each / (micro_tokens * ranks))
        gathers = {0: 0.0, 1: 2.0, 2: 2.0, 3: 6.0 * batches}[stage]
        bytes_moved += shape.parameters * (gathers + (4.0 if ranks > 1 else 0.0))
    compute = flops / (ranks * hardware.matrix.value * assumed.train_share.value)
    rate = hardware.link.value if ranks <= hardware.gpus_per_node.value else hardware.network.value
    communication = 0.0 if ranks == 1 else bytes_moved / rate
    return TrainCost(max(compute, communication), flops, tokens, communication)


def publish_seconds(
    shapes: list[ModelShape], ranks: int, same_node: bool, shared: bool, hardware: Hardware, assumed: Assumptions
) -> float:
    """EMA and conversion (14 bytes a parameter over the ranks), delivery to one engine GPU of each player, the pause.

    Delivery overlaps the EMA pass; all engine GPUs of a player receive at the same time.
    """
    parameters = float(sum(shape.parameters for shape in shapes))
    update = 14.0 * parameters / ranks / hardware.bandwidth.value
    rate = hardware.link.value if same_node else hardware.network.value
    delivery = 0.0 if shared else 2.0 * max(shape.parameters for shape in shapes) / rate
    return assumed.pause.value + max(update, delivery)
