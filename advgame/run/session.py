"""Everything a run needs, made from its settings: checked first, cheap things first, models last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from advgame.combinations import world_judges
from advgame.config import Config, PlayerSettings
from advgame.game.judge import Judge
from advgame.game.llm_judge import LLMJudge
from advgame.game.pairs import Role
from advgame.game.phrase_judge import PhraseJudge
from advgame.game.play import PlayRules, Table
from advgame.game.prompts import Templates
from advgame.game.rewards import RewardRules
from advgame.game.stream import SeedStream
from advgame.game.tree import Category, Seed
from advgame.learn.learner import Learner
from advgame.learn.streams import SideBySide
from advgame.learn.trainer import Trainer
from advgame.rollout.chat import ChatFormat, load_tokenizer
from advgame.rollout.endpoint_engine import EndpointSpeaker
from advgame.rollout.engine import Engine, Sampling
from advgame.rollout.meter import Meter
from advgame.rollout.sampler_process import SamplerProcess
from advgame.rollout.settings import SamplingSettings
from advgame.rollout.speaker import Asks, Speaker
from advgame.run import names
from advgame.run.check import Plan, load_templates
from advgame.run.engines import judge_engine, notes_of, open_endpoint_speaker, open_engine
from advgame.world.judge_training import judge_templates
from advgame.world.world import World, open_world

Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Side:
    """A model at the game: the roles it plays, its engine, and its learner unless it is frozen."""

    name: str
    roles: tuple[Role, ...]
    engine: Engine
    learner: Trainer | None


@dataclass(frozen=True)
class Session:
    """A run in memory.

    others: what samples beside the players (the judge's engine or speaker). meters: the time of every role that is
    sampled by an engine or a server. abreast: how the players' updates run beside each other.
    """

    config: Config
    world: World | None
    seeds: SeedStream
    validation: dict[str, list[Seed]]
    sides: tuple[Side, ...]
    table: Table
    rewards: RewardRules
    others: tuple[Engine | EndpointSpeaker, ...] = ()
    counters: Counter[str] = field(default_factory=Counter)
    meters: dict[str, Meter] = field(default_factory=dict)
    abreast: SideBySide = field(default_factory=lambda: SideBySide(torch.device("cpu"), allowed=False))

    @property
    def learners(self) -> dict[str, Trainer]:
        return {side.name: side.learner for side in self.sides if side.learner is not None}

    @property
    def frozen(self) -> frozenset[str]:
        """Roles that never learn."""
        return frozenset(role.value for side in self.sides if side.learner is None for role in side.roles)

    @property
    def direct_table(self) -> Table:
        """The same Defender and judge, asked the seeds as they are."""
        return replace(self.table, rules=replace(self.table.rules, skip_attacker=True))

    @property
    def engines(self) -> list[Engine]:
        return [side.engine for side in self.sides] + [o for o in self.others if not isinstance(o, EndpointSpeaker)]

    async def start(self) -> list[str]:
        """Starts every engine; returns what a user should know of them. Raises EngineError if one does not start."""
        for engine in self.engines:
            await engine.start()
        notes = notes_of(self.config, self.engines)
        return notes + [note for learner in self.learners.values() for note in learner.notes]

    async def close(self) -> None:
        for one in (*(side.engine for side in self.sides), *self.others):
            await one.close()


def open_session(plan: Plan, cache: Path | None = None, progress: Progress | None = None) -> Session:
    """Warm-starts the world if one is played, loads models, seats everybody."""
    config = plan.config
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    world = None
    templates, stream, validation = plan.templates, plan.seeds, plan.validation
    tokenizers = dict(plan.tokenizers)
    if config.world is not None:
        world = open_world(config.world, cache, progress=progress)
        world.make(world_roles(config))
        templates = load_templates(config, world.templates_dir)
        stream = stream or _world_stream(config, world)
        validation = validation or world_validation(world, config)

    counters: Counter[str] = Counter()
    meters: dict[str, Meter] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # learning and sampling in one process would take turns at Python's lock
    elsewhere = SamplerProcess() if config.run.ahead and device.type == "cpu" else None

    def tokenizer_of(folder: Path, name: str) -> PreTrainedTokenizerBase:
        if folder not in tokenizers:
            tokenizers[folder] = load_tokenizer(folder, name, remote_code=config.trust_remote_code)
        return tokenizers[folder]

    def engine_of(folder: Path, name: str, learner: Trainer | None, kind: str) -> Engine:
        field = f"{name}.model"
        tokenizer = tokenizer_of(folder, field)
        return open_engine(
            config,
            kind,
            folder,
            name=name,
            field=field,
            tokenizer=tokenizer,
            learner=learner,
            counters=counters,
            device=device,
            elsewhere=elsewhere,
            cluster=plan.cluster,
        )

    def speaker_of(name: str, engine: Engine, folder: Path, sampling: SamplingSettings) -> Speaker:
        chat = ChatFormat(tokenizer_of(folder, name))
        how = Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens)
        meter = meters.setdefault(name, Meter())
        return Speaker(name, engine, chat, how, config.run.seed, config.rollout.retries, counters=counters, meter=meter)

    def side_of(name: str, roles: tuple[Role, ...], folder: Path, settings: PlayerSettings) -> Side:
        learner = None
        if not settings.frozen:
            kind: Callable[..., Trainer] = Learner
            if config.learn.backend == "deepspeed":
                from advgame.learn.zero_learner import DeepSpeedLearner

                kind = DeepSpeedLearner
            learner = kind(
                folder,
                tokenizer_of(folder, f"{name}.model"),
                config.learn,
                field=f"{name}.model",
                lr=settings.lr,
                ema=config.rollout.source == "ema",
                ahead=config.run.ahead == 1,
                device=device,
                remote_code=config.trust_remote_code,
            )
        return Side(name, roles, engine_of(folder, name, learner, config.rollout.engine), learner)

    defender_folder = config.defender.model or _of_world(world, "shared" if config.game.self_play else "defender")
    attacker: Speaker | None = None
    if config.game.self_play:
        sides = [side_of("shared", (Role.ATTACKER, Role.DEFENDER), defender_folder, config.defender)]
        attacker = speaker_of("attacker", sides[0].engine, defender_folder, config.attacker.sampling)
    else:
        sides = [side_of("defender", (Role.DEFENDER,), defender_folder, config.defender)]
        if not config.game.skip_attacker:
            attacker_folder = config.attacker.model or _of_world(world, "attacker")
            sides.insert(0, side_of("attacker", (Role.ATTACKER,), attacker_folder, config.attacker))
            attacker = speaker_of("attacker", sides[0].engine, attacker_folder, config.attacker.sampling)
    defender = speaker_of("defender", sides[-1].engine, defender_folder, config.defender.sampling)

    judge: Judge
    others: list[Engine | EndpointSpeaker] = []
    if config.judge.kind == "rule":
        assert world is not None, "checked by the config"
        judge = world.judge(config.judge.noise, config.judge.bias, config.run.seed)
    elif config.judge.kind == "phrases":
        judge = PhraseJudge()
    elif (kind := judge_engine(config)) == "endpoint":
        remote = open_endpoint_speaker(config, counters)
        others.append(remote)
        meters["judge"] = remote.meter
        judge = llm_judge_of(config, remote, templates)
    else:
        folder = config.judge.model or _of_world(world, "judge")
        assert kind is not None, "an llm judge is sampled by something"
        engine = engine_of(folder, "judge", None, kind)
        others.append(engine)
        speaker = speaker_of("judge", engine, folder, config.judge.sampling)
        judge = llm_judge_of(config, speaker, judge_templates() if world_judges(config) else templates)

    assert stream is not None, "a config has a seed file or a world"
    table = Table(attacker, defender, judge, templates, _rules(config))
    rewards = RewardRules(config.game.attacker_judge, config.game.optimistic, zero_sum=config.game.self_play)
    sharded = config.learn.backend == "deepspeed"
    abreast = SideBySide(
        device,
        allowed=config.learn.streams == "auto" and not sharded,
        apart=sharded and config.learn.deepspeed.attacker_ranks is not None,
    )
    seated = tuple(sides)
    held = (counters, meters, abreast)
    return Session(config, world, stream, validation, seated, table, rewards, tuple(others), *held)


def world_roles(config: Config) -> list[str]:
    """The models that the world has to make for this run; made together, since each takes a process of its own."""
    if config.world is None:
        return []
    if config.game.self_play:
        roles = [] if config.defender.model else ["shared"]
    else:
        roles = [name for name in names.ROLES if getattr(config, name).model is None]
        roles = [name for name in roles if name == "defender" or not config.game.skip_attacker]
    return [*roles, "judge"] if world_judges(config) else roles


def llm_judge_of(config: Config, speaker: Asks, templates: Templates) -> LLMJudge:
    judge = config.judge
    stop = judge.style != "reason" if judge.stop_at_verdict is None else judge.stop_at_verdict
    return LLMJudge(speaker, templates, judge.samples, judge.swap, stop)


def _rules(config: Config) -> PlayRules:
    game = config.game
    return PlayRules(
        attacks=game.attacks,
        responses=game.responses,
        faithfulness=game.faithfulness,
        # a zero-sum Attacker is paid by the Defender's verdicts
        attacker_judge=game.attacker_judge and not game.self_play,
        optimistic=game.optimistic,
        pairwise=config.judge.mode == "pairwise",
        reasoning=game.reasoning,
        defender_reasoning=game.defender_reasoning,
        judge_sees_seed=game.condition_on == "seed",
        skip_attacker=game.skip_attacker,
    )


def _of_world(world: World | None, player: str) -> Path:
    assert world is not None, "checked by the config: a player without a model folder is the world's"
    path: Path = getattr(world, f"{player}_path")
    return path


def _world_stream(config: Config, world: World) -> SeedStream:
    def of(category: Category) -> list[Seed]:
        return [seed for seed in world.train_seeds if seed.category is category]

    return SeedStream(
        of(Category.HARMFUL), of(Category.BENIGN), config.run.seed, config.data.harmful, config.data.benign
    )


def world_validation(world: World, config: Config) -> dict[str, list[Seed]]:
    """Held-out intents, as they are and under held-out framings."""
    return {"vanilla": list(world.heldout_seeds), "adversarial": world.adversarial_seeds(config.data.validation_limit)}
