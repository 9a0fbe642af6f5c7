"""What `advgame train` and `advgame resume` do: check, open the run folder, play, sum up."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import sys
from collections import Counter
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from advgame.config import Config, dump_config, load_config
from advgame.errors import DiskFull, InputError, RanksDied
from advgame.learn.watch import Watch
from advgame.malloc import collect_rarely, keep_freed_memory
from advgame.rollout.engine import EngineError
from advgame.run import names
from advgame.run.check import Plan, check
from advgame.run.checkpoint import load_into
from advgame.run.checkpoint_files import latest_checkpoint, prune_checkpoints
from advgame.run.folder import RunFolder, write_text_atomically
from advgame.run.live import LiveView, Stage
from advgame.run.loop import Progress, state_of, train
from advgame.run.recorder import Recorder
from advgame.run.session import Session, open_session, world_roles
from advgame.run.summary import spread, write_summary
from advgame.run.trackers import make_trackers
from advgame.world.training import PlayerRole
from advgame.world.warmstart import steps_of

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write that room would mend."""
SUMMARY_NAMES = {
    names.EXPLOITABILITY: "exploitability",
    names.EXPLOITABILITY_BOUND: "exploitability_bound",
    names.EVAL_ASR: "asr",
    names.EVAL_COMPLIANCE: "benign_compliance",
    names.OVER_REFUSAL: "worst_over_refusal",
    names.HELDOUT_EXPLOITABILITY: "heldout_exploitability",
    names.GIBBERISH: "gibberish",
}


def stated_purpose(config: Config) -> str:
    """What the run's Attacker is for; asked for at a terminal, InputError elsewhere, if the settings do not say."""
    if config.run.purpose.strip():
        return config.run.purpose.strip()
    if config.world is not None:
        return "training in the tiny world, whose players know nothing of the real one"
    if config.game.skip_attacker:
        return "training a Defender on seeds as they are; no Attacker plays"
    if sys.stdin.isatty():
        answer = input("A trained Attacker is a controlled artifact. What is this one for? ").strip()
        if answer:
            return answer
    raise InputError("run.purpose: say what this Attacker is trained for (it is recorded in the run folder)")


def start(config: Config, *, quiet: bool = False) -> Path:
    """A new run; returns its folder. Raises InputError before any model is loaded where that can be told."""
    purpose = stated_purpose(config)
    with (
        closing(check(config)) as plan,
        RunFolder.create(config.run.root, config.run.name, dump_config(config), purpose=purpose) as folder,
    ):
        try:
            _persist(plan, folder, None, quiet=quiet)
        except (KeyboardInterrupt, InputError, EngineError, RanksDied):
            if not any(folder.trees.iterdir()):
                shutil.rmtree(folder.path)  # nothing was played: nothing to resume
            raise
        return folder.path


def config_of(path: Path, overrides: list[str]) -> Config:
    """The settings of a run folder, with `overrides`."""
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: not a run folder (no config.yaml); give the folder that `advgame train` printed")
    return load_config(path / "config.yaml", overrides)


def resume(path: Path, config: Config, *, quiet: bool = False) -> Path:
    """Continues a run from its newest intact checkpoint, with settings that `config_of` gave; one that was killed
    before its first, from the beginning."""
    with closing(check(config)) as plan, RunFolder.resume(path) as folder:
        found = latest_checkpoint(folder.checkpoints)
        if found.path is None and found.skipped:
            raise InputError(f"{path}: no intact checkpoint to resume from; start the run anew")
        _persist(plan, folder, found.path, quiet=quiet)
        return folder.path


def _persist(plan: Plan, folder: RunFolder, checkpoint: Path | None, *, quiet: bool) -> None:
    """The run to its end. Where trainer ranks die it goes on with new ones, as a resume does: from the newest
    checkpoint, and if there is none from the start."""
    most = plan.config.cluster.trainer_restarts
    restarts = Counter[str]()  # an older checkpoint does not know of them
    number, ended = 0, False
    while not ended:
        try:
            with _ranks(plan) as watch:
                _play(plan, folder, checkpoint, quiet=quiet, restarts=restarts, watch=watch)
            ended = True
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = error.filename or folder.path
            raise DiskFull(
                f"{where}: {error.strerror}; free some room, then continue with: advgame resume {folder.path}"
            ) from error
        except RanksDied as died:
            checkpoint = latest_checkpoint(folder.checkpoints).path
            if (number := number + 1) > most:
                more = f"; continue with: advgame resume {folder.path}" if checkpoint is not None else ""
                raise RanksDied(f"{died}; restarts spent: {most} (cluster.trainer_restarts){more}") from died
            restarts[names.TRAINER_RESTARTS] += 1
            folder = folder.again()
            LiveView(plan.config.run.steps, not quiet, log=folder.log).note(
                f"{died}; restart {number} of {most}: new trainer ranks go on from "
                f"{'the start' if checkpoint is None else checkpoint.name}"
            )


def _ranks(plan: Plan) -> AbstractContextManager[Watch | None]:
    """Inside, trainer ranks on the cluster, if there shall be any; the watch hears of their deaths."""
    config = plan.config
    if config.cluster.trainer_ranks is None:
        return nullcontext()
    from advgame.cluster.ray_ranks import led

    assert plan.cluster is not None, "checked by the config"
    return led(plan.cluster, config.learn.deepspeed.attacker_ranks, config.run.threads)


def _play(
    plan: Plan,
    folder: RunFolder,
    checkpoint: Path | None,
    *,
    quiet: bool,
    restarts: Counter[str],
    watch: Watch | None,
) -> None:
    """The run in its folder, from `checkpoint` if there is one. restarts: of the command so far; the run's counter
    takes the larger number, and so does this."""
    config = plan.config
    keep_freed_memory()
    collect_rarely()
    parts = {role: steps_of(config.world, PlayerRole(role)) for role in world_roles(config)} if config.world else {}
    with Stage("warm start", parts, not quiet) as stage:

        def progress(role: str, step: int, _steps: int, loss: float) -> None:
            stage.update(role, step, loss=loss)

        session = open_session(plan, progress=progress)
    for learner in session.learners.values():
        learner.check_folder(folder.checkpoints)  # now, not in the first checkpoint hours later
    progress_of_run = Progress()
    if checkpoint is not None:
        progress_of_run = _restore(session, checkpoint)
        # what a kill left beside it; nobody may save again, if all steps are played
        prune_checkpoints(folder.checkpoints, progress_of_run.step, config.run.keep_checkpoints)
    # settings that do not fit the checkpoint have been refused by now, and leave the run as it was
    if folder.attempt > 0 and load_config(folder.config) != config:
        write_text_atomically(folder.config, dump_config(config))
    if most := max(counter[names.TRAINER_RESTARTS] for counter in (restarts, session.counters)):
        restarts[names.TRAINER_RESTARTS] = session.counters[names.TRAINER_RESTARTS] = most
    asyncio.run(_run(session, folder, progress_of_run, quiet=quiet, watch=watch))


def _restore(session: Session, checkpoint: Path) -> Progress:
    """Fills the session's players from a checkpoint."""
    wholes = {name: learner.whole() for name, learner in session.learners.items()}
    states = {name: state_of(learner, wholes[name]) for name, learner in session.learners.items()}
    loaded = load_into(checkpoint, states, verify=False)
    for name, learner in session.learners.items():
        learner.updates = loaded.updates[name]
        learner.averages = loaded.extra.get("averages", {}).get(name, loaded.step)  # one a step
        learner.reference.restore(loaded.extra["reference"][name])
        learner.take(wholes[name])
    progress = Progress(loaded.step, loaded.extra, loaded.trees)
    session.counters.update(progress.counters)
    return progress


async def _run(session: Session, folder: RunFolder, progress: Progress, *, quiet: bool, watch: Watch | None) -> None:
    config, again = session.config, folder.attempt > 0
    with (
        Recorder(folder) as recorder,
        LiveView(config.run.steps, not quiet, first_step=progress.step, log=folder.log) as view,
    ):
        if again:
            recorder.rewind(progress.step)
            view.note(f"resuming {folder.path} at step {progress.step}")
        trackers = make_trackers(
            folder,
            tensorboard=config.run.tensorboard,
            wandb=config.run.wandb,
            project=config.run.wandb_project,
            config=config.model_dump(mode="json"),
            purge_step=progress.step if again else None,
        )

        async def played() -> dict[str, float] | None:
            for note in await session.start():
                view.note(note)
            if again:
                for side in session.sides:
                    if side.learner is not None:
                        await side.engine.publish(progress.step, side.learner.serve_into)
            return await train(session, folder, recorder, trackers, view, progress)

        try:
            after = await (played() if watch is None else watch.guard(played()))
        except RanksDied as died:
            if not progress.stopping:
                raise
            view.note(str(died))  # who wants to stop does not wait for new ranks
            after = None
        finally:
            for tracker in trackers:
                tracker.close()
            await session.close()
        if after is None:
            missing = "" if progress.step < config.run.steps else ", before the final evaluation, which is missing"
            view.note(f"stopped after step {progress.step}{missing}; continue with: advgame resume {folder.path}")
            return
    console = Console(quiet=quiet)
    write_summary(
        folder,
        _summary_values(progress.before),
        _summary_values(after),
        progress.seconds,
        more={
            "steps": progress.step,
            "counters": dict(session.counters),
            **progress.totals.summary(),
            **_decisions(session),
        },
        console=console,
    )
    console.print(progress.totals.line(), highlight=False)
    console.print(f"as a page, with every tree: advgame report {folder.path}", markup=False, soft_wrap=True)


def _summary_values(measured: dict[str, float]) -> dict[str, float]:
    return {SUMMARY_NAMES.get(key, key.removeprefix("eval/")): value for key, value in measured.items()}


def _decisions(session: Session) -> dict[str, Any]:
    decided: dict[str, Any] = {
        "reference": {name: learner.reference.state() for name, learner in session.learners.items()}
    }
    if prompts := session.counters["judge_prompt_tokens"]:
        decided["judge_cached_share"] = session.counters["judge_cached_tokens"] / prompts
    return decided


def summarise_seeds(folders: list[Path], console: Console) -> None:
    """Mean and spread of the summaries of several runs, one line a figure."""
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    table = Table(title=f"{len(folders)} seeds: mean (lowest to highest)", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, label in names.LABELS.items():
        cells = [
            spread([s[key] for s in summaries if s.get(key := f"{name}_{when}") is not None], ".3f")
            for when in ("before", "after")
        ]
        table.add_row(label, *cells)
    table.add_row("seconds of the game", "", spread([s["seconds"] for s in summaries], ".0f"))
    console.print(table)
