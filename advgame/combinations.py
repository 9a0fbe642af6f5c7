"""What no single setting can tell: combinations that cannot be, each with its mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advgame.config import Config
    from advgame.game.settings import JudgeSettings


def says_verdict_length(judge: JudgeSettings) -> bool:
    return "sampling" in judge.model_fields_set and "max_tokens" in judge.sampling.model_fields_set


WORLD_VERDICT_TOKENS = 16
"""Longest completion of the world's own judge unless the settings say another; its verdicts have 8 tokens."""
MOST_VERDICT_TOKENS = 128
"""Of its 256 positions."""


def world_judges(config: Config) -> bool:
    """Whether the judge is the tiny world's own language model."""
    judge = config.judge
    return config.world is not None and judge.kind == "llm" and judge.model is None and judge.endpoint is None


def _world_or_models(c: Config) -> str | None:
    if c.world is None:
        if c.data.train is None:
            return "data.train: give a seed file, or a world: section for the tiny world"
        players = ["defender"] if c.game.skip_attacker else ["attacker", "defender"]
        for name in ["defender"] if c.game.self_play else players:
            if getattr(c, name).model is None:
                return f"{name}.model: give a Hugging Face model folder, or a world: section for the tiny world"
        if c.judge.kind == "rule":
            return "judge.kind: the rule judge knows the tiny world only; use llm (or phrases for a smoke test)"
    return None


def _templates(c: Config) -> str | None:
    """A user's own judge texts must be of the form that will be asked."""
    folder = c.game.templates
    if folder is None or not folder.is_dir() or c.judge.kind != "llm":
        return None
    used, other = ("pair", "point") if c.judge.mode == "pairwise" else ("point", "pair")
    if any(folder.glob(f"judge_{other}_*.md")) and not any(folder.glob(f"judge_{used}_*.md")):
        return (
            f"game.templates: {folder} holds judge_{other}_*.md templates, but judge.mode is {c.judge.mode}; "
            f"write judge_{used}_*.md or change judge.mode"
        )
    return None


def _judge(c: Config) -> str | None:
    remote = c.judge.endpoint is not None
    if remote and c.judge.kind != "llm":
        return "judge.endpoint: only an llm judge asks a server; set judge.kind: llm"
    if remote and c.judge.engine not in (None, "endpoint"):
        return f"judge.engine: {c.judge.engine} does not go with judge.endpoint; drop one of them"
    if c.judge.engine == "endpoint" and not remote:
        return "judge.endpoint: give url and model of the server"
    if remote and c.judge.model is not None:
        return "judge.model: the endpoint serves its own model; drop this or judge.endpoint"
    if c.judge.kind == "llm" and c.judge.model is None and not remote and c.world is None:
        return "judge.model: an llm judge needs a model folder (or judge.endpoint a server)"
    if world_judges(c):
        most = c.judge.sampling.max_tokens
        if says_verdict_length(c.judge) and most > MOST_VERDICT_TOKENS:
            return f"judge.sampling.max_tokens: {most} leaves the world's own judge no room to read; set 16"
        if c.judge.style != "reason":
            return "judge.style: the world's own judge writes bare verdicts, it knows no other form; leave this out"
        if c.game.templates is not None and any(c.game.templates.glob("judge_*.md")):
            return f"game.templates: the world's own judge reads its own texts, not judge_*.md of {c.game.templates}"
    if c.judge.kind != "llm" and (c.judge.style != "reason" or c.judge.stop_at_verdict is not None):
        return "judge.style, judge.stop_at_verdict: only an llm judge writes its verdicts; leave them out"
    if c.judge.mode == "pointwise" and c.judge.swap:
        return "judge.swap: a pointwise judge sees one answer, there is nothing to swap; set it to false"
    if c.judge.kind != "rule" and (c.judge.noise or c.judge.bias):
        return "judge.noise, judge.bias: only the rule judge takes artificial noise; set them to 0"
    return None


def _objective(c: Config) -> str | None:
    on_policy = c.rollout.source == "live"
    pairs = c.learn.objective in ("dpo", "ipo")
    if c.learn.importance_weights and (c.learn.objective != "grpo" or not on_policy):
        return (
            "learn.importance_weights: only for on-policy grpo (rollout.source: live); "
            "off-policy GRPO samples from the EMA without them"
        )
    if pairs and on_policy and c.learn.reference in ("auto", "rollout", "recompute"):
        return (
            f"learn.reference: {c.learn.reference} needs the sampler to be the reference, but rollout.source is live; "
            "set learn.reference: initial"
        )
    if pairs and not on_policy and c.learn.reference == "initial":
        return "learn.reference: initial is for on-policy runs; set rollout.source: live, or reference: auto"
    if not pairs and c.learn.nll_weight:
        return "learn.nll_weight: an NLL on the chosen needs pairs; set learn.objective to dpo or ipo, or it to 0"
    if not pairs and c.learn.length_normalised:
        return "learn.length_normalised: for dpo and ipo only (grpo: learn.aggregate: token)"
    if pairs and c.game.responses < 2 and not c.defender.frozen:
        return "game.responses: the Defender's preference pairs need at least 2"
    if pairs and c.game.attacks < 2 and not (c.attacker.frozen or c.game.skip_attacker):
        return "game.attacks: the Attacker's preference pairs need at least 2"
    return None


def _engines(c: Config) -> str | None:
    vllm = c.rollout.vllm
    for field, names in (("devices", set(vllm.devices)), ("replicas", set(vllm.replicas))):
        if c.rollout.engine == "vllm" and c.game.self_play and {"attacker", "defender"} & names:
            return f"rollout.vllm.{field}: with game.self_play both roles are the engine `shared`"
    for name, devices in vllm.devices.items():
        if isinstance(devices, list) and len(devices) != (count := vllm.replicas_of(name)):
            return (
                f"rollout.vllm.devices: {name} has {len(devices)} entries for {count} replicas; give one each, or one "
                "text that all share"
            )
    return None


def _cluster(c: Config) -> str | None:
    ranks = c.cluster.trainer_ranks
    if ranks is not None and c.cluster.placement == "local":
        return (
            "cluster.trainer_ranks: ranks that Ray starts need cluster.placement: ray; set that, or leave this out and "
            "start with torchrun"
        )
    if ranks is not None and c.learn.backend == "plain":
        return (
            "cluster.trainer_ranks: learn.backend: plain trains in the one process that was started; set deepspeed, or "
            "leave this out"
        )
    if ranks is not None and (cards := c.cluster.gpus.get("trainer", 1)) not in (0, 1):
        return f"cluster.gpus: a trainer rank computes on one GPU, or on none, not on {cards:g}; set trainer: 1 or 0"
    if c.cluster.placement == "local":
        return None
    judged = c.judge.kind == "llm" and c.judge.endpoint is None and (c.judge.engine or c.rollout.engine) == "vllm"
    if c.rollout.engine != "vllm" and not judged and ranks is None:
        return "cluster.placement: ray places vLLM engines, and this run has none; set rollout.engine: vllm"
    if c.rollout.engine == "vllm" and c.rollout.vllm.transport not in ("auto", "collective"):
        return (
            f"rollout.vllm.transport: {c.rollout.vllm.transport} does not leave its node; with cluster.placement: ray "
            "set collective (or auto)"
        )
    if c.rollout.vllm.devices:
        return "rollout.vllm.devices: with cluster.placement: ray the cluster hands out GPUs; leave it out"
    return None


def _overlap(c: Config) -> str | None:
    if not c.run.carry_over:
        return None
    if c.run.deterministic:
        return (
            "run.carry_over: which trees are late depends on the clock, so no run would repeat; set "
            "run.deterministic: false, or this to 0"
        )
    if c.learn.objective in ("dpo", "ipo") and c.learn.reference in ("auto", "recompute"):
        return (
            f"learn.reference: {c.learn.reference} recomputes from one average, but with run.carry_over the trees of a "
            "step were sampled from several; set learn.reference: rollout"
        )
    return None


def _deepspeed(c: Config) -> str | None:
    learn = c.learn
    if learn.backend == "plain":
        return None
    if learn.lora is not None:
        return "learn.lora: adapters are small enough for one process; set learn.backend: plain, or leave this out"
    if learn.optimizer != "adamw":
        return f"learn.optimizer: {learn.optimizer} cannot be sharded; set adamw"
    if learn.compile:
        return "learn.compile: DeepSpeed's hooks do not go through torch.compile; set it to false"
    one = c.game.self_play or c.game.skip_attacker or c.attacker.frozen or c.defender.frozen
    if learn.deepspeed.attacker_ranks is not None and one:
        return "learn.deepspeed.attacker_ranks: only one player learns; leave this out, and all ranks train it"
    return None


def _players(c: Config) -> str | None:
    attacker_plays = not c.game.skip_attacker
    if c.defender.frozen and (c.attacker.frozen or not attacker_plays):
        return "attacker.frozen, defender.frozen: nobody would learn; free one player"
    if c.learn.schedule == "sequential" and (c.attacker.frozen or c.defender.frozen or not attacker_plays):
        return "learn.schedule: sequential rounds need both players free; use joint"
    if c.game.self_play:
        if c.learn.objective != "reinforce" or c.rollout.source != "live":
            return "game.self_play: Self-RedTeam needs learn.objective: reinforce and rollout.source: live"
        if c.game.skip_attacker or c.attacker.frozen or c.defender.frozen or c.learn.schedule != "joint":
            return "game.self_play: one shared model plays both roles; skip_attacker, frozen, sequential do not apply"
        if c.attacker.model not in (None, c.defender.model):
            return "attacker.model: with game.self_play the shared model is defender.model; leave this null"
    if c.learn.objective == "reinforce" and c.rollout.source != "live":
        return "learn.objective: reinforce is on-policy; set rollout.source: live"
    if c.data.harmful + c.data.benign == 0:
        return "data.harmful, data.benign: a step needs seeds; raise one of them"
    return None


COMBINATIONS = (_world_or_models, _judge, _templates, _objective, _overlap, _deepspeed, _players, _engines, _cluster)
"""Each looks at the whole tree and returns "field: what cannot be and the mend", or None."""
