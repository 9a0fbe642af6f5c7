"""The loop: play, learn, publish, measure, save. One step of the game (docs/game.md) is one turn of `train`."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from advgame.game.pairs import Role, groups_of, pairs_of
from advgame.game.rewards import TreeRewards, tree_rewards
from advgame.game.tree import Attack, Category, Outcome, Response, Tree
from advgame.learn.trainer import Trainer, Whole
from advgame.rollout.engine import EngineError
from advgame.rollout.replicas import Served
from advgame.rollout.speaker import Speaker
from advgame.run import names
from advgame.run.effort import Clock, Replicas, Totals, step_effort
from advgame.run.energy import EnergyMeter, gpu_roles
from advgame.run.engines import devices_of
from advgame.run.evaluate import exact, examine_judge, judge_metrics, sampled_success, validate
from advgame.run.folder import RunFolder
from advgame.run.live import LiveView
from advgame.run.metrics import play_metrics
from advgame.run.plays import Place, Plays
from advgame.run.recorder import Recorder
from advgame.run.saver import Saver
from advgame.run.session import Session, Side
from advgame.run.stop import Stop
from advgame.run.trackers import Tracker
from advgame.run.train_state import PlayerState, TrainState
from advgame.run.verify import gap_metrics, measure_gaps

T = TypeVar("T")
Scored = Sequence[tuple[Tree, TreeRewards]]


class Progress:
    """What a checkpoint keeps of a run beside its players. `kept` and `owed`: see `Plays`. stopping: whether somebody
    has asked for a stop, which is not kept."""

    def __init__(self, step: int = 0, extra: Mapping[str, Any] | None = None, kept: Sequence[Tree] = ()):
        extra = extra or {}
        self.step = step
        self.seconds = float(extra.get("seconds", 0.0))
        self.before: dict[str, float] = dict(extra.get("before", {}))
        self.counters: Counter[str] = Counter(extra.get("counters", {}))
        self.totals = Totals(extra.get("totals"))
        self.kept = kept
        self.owed: list[Place] = [(step, index) for step, index in extra.get("owed", ())]
        self.stopping = False

    def extra(self, session: Session) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "totals": dict(self.totals.sums),
            "owed": self.owed,
            "before": self.before,
            "counters": dict(session.counters),
            "reference": {name: learner.reference.state() for name, learner in session.learners.items()},
            "averages": {name: learner.averages for name, learner in session.learners.items()},
        }


async def train(
    session: Session,
    folder: RunFolder,
    recorder: Recorder,
    trackers: Sequence[Tracker],
    view: LiveView,
    progress: Progress,
) -> dict[str, float] | None:
    """Plays from `progress.step` to the end; returns the final evaluation, or None if it was interrupted."""
    run, stop = session.config.run, Stop(view.note)
    plays = Plays(session, progress.kept, progress.owed)
    roles = gpu_roles(devices_of(session.config), os.environ.get("CUDA_VISIBLE_DEVICES"))
    energy = EnergyMeter(roles, run.carbon, nodes=session.config.cluster.placement == "ray")
    if energy.note:
        view.to_log(energy.note)
    counted, replicas = Counter(session.counters), Replicas(view.note)
    # beside play, learning needs a thread of its own; alone it needs none
    learner = ThreadPoolExecutor(1, "learn") if run.ahead or run.carry_over else None
    # adapters are merged while they are written
    saver = Saver(folder, run.keep_checkpoints, beside=run.checkpoint_beside and session.config.learn.lora is None)

    def log(step: int, values: Mapping[str, float]) -> None:
        recorder.metrics(step, values)
        for tracker in trackers:
            tracker.log(step, values)

    try:
        while progress.step < run.steps and not stop.asked:
            step, clock = progress.step, Clock()
            play_next = run.ahead == 1 and step + 1 < run.steps
            before = Counter(session.counters)
            with clock.stage("validate"):
                begun = energy.reading()
                measured = await stop.unless_asked(due(session, step))
            if measured is None or stop.asked:
                break
            if step == 0:
                progress.before = measured
            measured = measured | energy.evaluated(begun) if measured else measured
            for meter in session.meters.values():
                meter.take()  # what evaluation used
            counted += Counter(session.counters) - before  # evaluation asks the judge too
            started = time.perf_counter()
            trees = await plays.batch(step)
            check_answered(session, trees, step)
            judged = judge_metrics(session, trees, counted)
            counted = Counter(session.counters)
            rewards = [tree_rewards(tree, session.rewards) for tree in trees]
            scored = list(zip(trees, rewards, strict=True))
            if play_next:
                plays.begin(step + 1)
            with clock.stage("learn"):
                gaps = await aside(learner, measure_gaps, session, trees, step) if not run.ahead else {}
                learned = await aside(learner, learn, session, scored, step)
            await aside(learner, recorder.trees, step, trees, rewards)
            if play_next:
                await plays.ready(step + 1)  # before the weights change
                gaps = await aside(learner, measure_gaps, session, plays.kept, step)
            learned |= gap_metrics(session, trees, step, gaps, learned, view.note)
            with clock.stage("publish"):
                await publish(session, step + 1)
            game_seconds = time.perf_counter() - started

            progress.step += 1
            values = play_metrics(trees, rewards, version=step, frozen=session.frozen)
            values |= replicas.take(session.engines, session.counters)
            values |= judged | learned | measured | publish_times(session)
            values |= {f"{names.COUNTER_PREFIX}{k}": float(v) for k, v in session.counters.items() if _is_problem(k)}
            if run.carry_over:
                values[names.LATE_TREES] = float(sum(tree.step < step for tree in trees))
            values |= step_effort(clock, session.meters, plays.take(), len(trees), game_seconds) | energy.lap()
            progress.seconds += values[names.STEP_SECONDS]
            progress.totals.add(values, len(trees))
            log(step, values)
            view.update(step, values)
            if run.checkpoint_every and progress.step % run.checkpoint_every == 0:
                save(session, saver, progress, plays, trackers)
            saver.check()

        # after step 0 too: who stops in the first evaluation can resume
        if not run.checkpoint_every or not progress.step or progress.step % run.checkpoint_every:
            save(session, saver, progress, plays, trackers)
        saver.wait()
    finally:
        progress.stopping = stop.asked
        await plays.close()
        if learner is not None:
            learner.shutdown()
        saver.close()
    if progress.step < run.steps:
        return None
    after = await stop.unless_asked(measure(session, progress.step))
    if after is not None:
        log(progress.step, after)
    return after


async def aside(thread: Executor | None, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, in `thread` if there is one, while the event loop goes on."""
    if thread is None:
        return function(*arguments)
    return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)


def check_answered(session: Session, trees: Sequence[Tree], step: int) -> None:
    """Raises EngineError with the engine's own words when every request of a player failed in this step."""
    attacks = [attack for tree in trees for attack in tree.attacks if not attack.direct]
    responses = [r for tree in trees for attack in tree.attacks for r in attack.responses]
    players: list[tuple[Speaker | None, Sequence[Attack | Response]]]
    players = [(session.table.attacker, attacks), (session.table.defender, responses)]
    for speaker, made in players:
        if speaker is not None and made and all(one.outcome is Outcome.ENGINE_FAILED for one in made):
            raise EngineError(f"step {step}: every request to the {speaker.name} failed: {speaker.last_error}")


async def due(session: Session, step: int) -> dict[str, float]:
    """What is measured before a step: everything at the start, then what its turn is."""
    run = session.config.run
    if step == 0:
        return await examine_judge(session) | await measure(session, step)
    values = await validate(session, step) if run.validate_every and step % run.validate_every == 0 else {}
    return values | exact(session) if run.exact_every and step % run.exact_every == 0 else values


async def measure(session: Session, step: int) -> dict[str, float]:
    """The full evaluation of start and end."""
    values = await validate(session, step)
    values |= await sampled_success(session, step)
    return values | exact(session)


def learn(session: Session, scored: Scored, step: int) -> dict[str, float]:
    """The step's updates of every player whose turn it is: one a category, or one over both."""
    settings = session.config.learn
    everything = [scored] if settings.accumulate or session.config.game.self_play else by_category(scored)
    progress = step / max(1, session.config.run.steps - 1)

    def of(side: Side) -> dict[str, float]:
        assert side.learner is not None
        updates = [update(side, part, session, progress) for part in everything]
        values = {}
        for key in sorted({key for metrics in updates for key in metrics}):
            known = [metrics[key] for metrics in updates if key in metrics]
            values[f"learn/{side.name}/{key}"] = sum(known) / len(known)
        return values | {f"learn/{side.name}/lr": side.learner.lr_at(progress)}

    turns = [side for side in session.sides if side.learner is not None and has_turn(session, side, step)]
    values: dict[str, float] = {}
    for made in session.abreast.run([partial(of, side) for side in turns]):
        values |= made
    return values


def update(side: Side, part: Scored, session: Session, progress: float) -> dict[str, float]:
    """One optimiser step of one model on one part of the step's trees."""
    assert side.learner is not None
    settings = session.config.learn
    if settings.objective in ("dpo", "ipo"):
        return side.learner.update_pairs([pair for role in side.roles for pair in pairs_of(role, part)], progress)
    across, shared = settings.baseline == "across_seeds", session.config.game.self_play
    # the two categories' rewards come from different rubrics: a baseline never spans both
    groups = [
        group
        for one in by_category(part)
        for role in side.roles
        for group in groups_of(role, one, across_seeds=across, learn_from_failed=shared)
    ]
    return side.learner.update_groups(groups, progress)


def by_category(scored: Scored) -> list[Scored]:
    parts = [[item for item in scored if item[0].seed.category is category] for category in Category]
    return [part for part in parts if part]


def has_turn(session: Session, side: Side, step: int) -> bool:
    """In sequential rounds the Attacker learns for `round_steps` steps, then the Defender, and so on."""
    learn = session.config.learn
    if learn.schedule == "joint":
        return True
    return side.roles == ((Role.ATTACKER, Role.DEFENDER)[step // learn.round_steps % 2],)


async def publish(session: Session, version: int) -> None:
    """Every learning player's new weights into its engine. A player whose turn it is not keeps its moving average
    moving: its live weights stand still and the average approaches them."""
    learned = time.perf_counter()
    for side in session.sides:
        if side.learner is not None:
            await side.engine.publish(version, side.learner.publish_into)
            side.engine.first_token.published(learned)


def publish_times(session: Session) -> dict[str, float]:
    """Of every learning player: seconds from the former step's learning to the first token of the weights it made, and
    milliseconds of each part of the newest publish into a vLLM engine."""
    values: dict[str, float] = {}
    for side in session.sides:
        if side.learner is None:
            continue
        if side.engine.first_token.seconds:
            values[names.first_token_seconds(side.name)] = side.engine.first_token.seconds
        if isinstance(side.engine, Served):
            parts = asdict(side.engine.last_publish)
            values |= {f"publish/{side.name}/{part}_ms": 1000 * seconds for part, seconds in parts.items()}
    return values


def save(session: Session, saver: Saver, progress: Progress, plays: Plays, trackers: Sequence[Tracker] = ()) -> None:
    for tracker in trackers:
        tracker.flush()
    progress.owed = plays.owed
    players = {name: state_of(learner, learner.whole()) for name, learner in session.learners.items()}
    trees = [(tree, tree_rewards(tree, session.rewards)) for tree in plays.kept]
    saver.save(TrainState(progress.step, players, progress.extra(session), trees))


def state_of(learner: Trainer, whole: Whole) -> PlayerState:
    return PlayerState(
        whole.model,
        learner.tokenizer,
        whole.shadow,
        whole.optimizer,
        learner.updates,
        previous=whole.previous,
        recomputes=learner.recomputes,
        lora=learner.settings.lora,
        elsewhere=whole.elsewhere,
    )


def _is_problem(counter: str) -> bool:
    return not counter.endswith(("_requests", "_tokens"))
