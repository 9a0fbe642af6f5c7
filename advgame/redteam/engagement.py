"""A campaign in its folder: opens models, shows progress, writes everything down whatever ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from advgame.evals.named import ModelSpec
from advgame.game.tree import Seed
from advgame.redteam.budget import Budget
from advgame.redteam.campaign import Outcome, run_campaign
from advgame.redteam.command import gentle_stop, nonzero
from advgame.redteam.exports import About, write_exports
from advgame.redteam.folder import CampaignFolder
from advgame.redteam.measures import Figures, figures
from advgame.redteam.models import Models
from advgame.redteam.page import format_rate, run_page
from advgame.redteam.plan import Plan
from advgame.redteam.records import Ledger
from advgame.redteam.seating import seat
from advgame.redteam.strategies import Attempt
from advgame.rollout.endpoint_engine import check_endpoint
from advgame.run.folder import write_text_atomically


async def engage(
    plan: Plan,
    seeds: Sequence[Seed],
    out: Path,
    purpose: str,
    budget: Budget,
    *,
    dtype: str | None = None,
    models: Models | None = None,
    notes: Sequence[str] = (),
    view: bool = True,
    guard: bool = True,
) -> Outcome:
    """One campaign, begun or continued in `out`.

    `models` shares opened models between campaigns; without it they are opened and closed here. `guard`: the first
    Ctrl-C stops gently; off where the caller sees to it.
    """
    console = Console(stderr=True, quiet=not view)
    counters: Counter[str] = Counter()
    own = models is None
    models = models or open_models([plan], dtype, counters)
    notes = [*notes, *egress_notes(plan.specs)]
    for note in notes:
        console.print(note, markup=False, highlight=False)
    with CampaignFolder.open(out, purpose, plan.settings(seeds)) as folder:
        try:
            with Ledger(folder.queries, budget, plan.run_seed, purpose) as ledger, _progress(console) as progress:
                task = progress.add_task("seeds", total=len(seeds), queries=0)
                campaign = await seat(
                    plan,
                    plan.strategy,
                    ledger,
                    models,
                    counters,
                    on_query=lambda: progress.update(task, queries=budget.queries),
                )
                with gentle_stop(budget.stop, progress.console.print) if guard else nullcontext():
                    outcome = await run_campaign(
                        campaign, seeds, budget, on_seed=lambda _: progress.update(task, advance=1)
                    )
                counters.update(ledger.counters)
        finally:
            if own:
                await models.close()
        found = _write(folder, plan, outcome.attempts, budget, nonzero(counters), notes)
    _tell(console, found, budget, out)
    return outcome


def open_models(plans: Sequence[Plan], dtype: str | None, counters: Counter[str]) -> Models:
    """An empty store of models for `plans`."""
    remote = any(spec.endpoint is not None for plan in plans for spec in plan.specs)
    kind = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return Models(kind, remote, counters)


def egress_notes(specs: Sequence[ModelSpec]) -> list[str]:
    """One line for every server that texts are sent to."""
    hosts: dict[str, list[str]] = {}
    for spec in specs:
        if spec.endpoint is not None:
            hosts.setdefault(check_endpoint(spec.endpoint, spec.field), []).append(spec.field)
    return [f"egress: texts go to {host} ({', '.join(fields)})" for host, fields in hosts.items()]


def about(plan: Plan, purpose: str) -> About:
    settings: dict[str, str | int | float] = {"k": plan.k} if plan.search is None else {}
    if plan.search is not None:
        search = plan.search
        settings |= {"roots": search.roots, "branching": search.branching, "width": search.width}
        settings |= {"depth": search.depth, "keep_last": search.keep_last}
    named = plan.classifier if isinstance(plan.classifier, str) else plan.classifier.text
    return About(purpose, plan.strategy, plan.attacker.text, plan.target.text, named, settings)


def _write(
    folder: CampaignFolder,
    plan: Plan,
    attempts: Sequence[Attempt],
    budget: Budget,
    counters: dict[str, int],
    notes: Sequence[str],
) -> Figures:
    found = figures(attempts)
    what = about(plan, folder.purpose)
    spent = {"target_queries": budget.queries, "tokens": budget.tokens}
    summary: dict[str, Any] = {"strategy": plan.strategy, "attacker": what.attacker, "target": what.target}
    summary |= {"classifier": what.classifier, "figures": found.as_json(), "spent": spent, "counters": counters}
    folder.finish(attempts, summary, counters)
    write_exports(folder.path, what, attempts)
    facts = {
        "strategy": plan.strategy,
        "attacker": what.attacker,
        "target": what.target,
        "judge": plan.judge if isinstance(plan.judge, str) else plan.judge.text,
        "classifier": what.classifier,
        "settings": ", ".join(f"{name} {value}" for name, value in what.parameters.items()),
        "spent": f"{budget.queries} target queries, {budget.tokens} tokens of all models",
        "counted in this start": ", ".join(f"{name} {value}" for name, value in counters.items()),
    }
    write_text_atomically(folder.path / "report.html", run_page(folder.purpose, facts, found, attempts, notes))
    return found


def _tell(console: Console, found: Figures, budget: Budget, out: Path) -> None:
    console.print(
        f"attack success rate {format_rate(found.asr, percent=True)}, {budget.queries} target queries, "
        f"{budget.tokens} tokens",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if found.finished < found.seeds:
        console.print(
            f"{found.seeds - found.finished} of {found.seeds} seeds are unfinished and count as no success; the same "
            f"command goes on in {out}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[queries]} target queries"),
        TimeElapsedColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
