"""`advgame redteam --transfer`: every attacker against every target, with how diverse and how faithful each is."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from advgame.errors import InputError
from advgame.evals.named import ModelSpec, parse_model
from advgame.evals.stats import Estimate
from advgame.redteam.budget import Budget
from advgame.redteam.campaign import Outcome
from advgame.redteam.command import gentle_stop, nonzero, plan_options, positive, stated_purpose
from advgame.redteam.embedding import mean_hidden_states
from advgame.redteam.engagement import egress_notes, engage, open_models
from advgame.redteam.goals import WORLD, read_goals
from advgame.redteam.measures import Figures, figures
from advgame.redteam.models import Models
from advgame.redteam.page import document, format_rate, table
from advgame.redteam.plan import Plan, check_seeds, goals_of_world, make_plan
from advgame.redteam.records import NOTICE
from advgame.redteam.strategies import Attempt
from advgame.run.diversity import distinct_n, mean_cosine, self_bleu, spread, words
from advgame.run.folder import write_text_atomically

_NAMED = re.compile(r"([A-Za-z0-9_.+-]+)=(.+)", re.DOTALL)
_STRATEGY = re.compile(r"([a-z+]+)@(.+)", re.DOTALL)


@dataclass(frozen=True)
class Diversity:
    """Of `n` attacks that the target was asked, the same n in every cell; all None where there were fewer.

    self_bleu: 0 to 100, higher is more alike; distinct: different n-grams by all; cosine: mean off-diagonal, higher is
    more alike, None without an embedding model. Each can be gamed alone (gibberish is diverse), so they stand together
    and beside faithfulness.
    """

    n: int
    self_bleu: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Cell:
    """One attacker against one target."""

    attacker: str
    target: str
    figures: Figures
    diversity: Diversity


def run_transfer(arguments: argparse.Namespace) -> int:
    """Runs or continues the matrix; every cell is a red-team run of its own in a folder below --out."""
    purpose = stated_purpose(arguments.purpose, arguments.out)
    plans = _plans(arguments)
    limit = positive(arguments.limit, "limit")
    first = next(iter(plans.values()))
    goals = goals_of_world(first, limit) if arguments.seeds == WORLD else read_goals(arguments.seeds, limit)
    for plan in plans.values():
        check_seeds(plan, goals.seeds)
    size = 64 if arguments.sample is None else positive(arguments.sample, "sample")
    embed = None if arguments.embed is None else parse_model(arguments.embed, "--embed", "target")
    if embed is not None and embed.endpoint is not None:
        raise InputError("--embed: a server gives no hidden states; name a model folder")
    parallel = positive(arguments.parallel, "parallel") or 4

    console = Console(stderr=True, quiet=arguments.quiet)
    counters: Counter[str] = Counter()
    models = open_models(list(plans.values()), arguments.dtype, counters)
    outcomes = asyncio.run(_run(plans, goals.seeds, arguments.out, purpose, models, parallel, console))
    cells = [
        Cell(name, target, figures(outcome.attempts), diversity(outcome.attempts, size, embed))
        for (name, target), outcome in outcomes.items()
    ]
    _write(arguments.out, purpose, cells, nonzero(counters))
    _tell(console, cells)
    print(arguments.out)
    for outcome in outcomes.values():
        outcome.raise_failures()
    return 0


def _plans(arguments: argparse.Namespace) -> dict[tuple[str, str], Plan]:
    """One checked plan for each pair of names."""
    plans: dict[tuple[str, str], Plan] = {}
    options = plan_options(arguments)
    search = options.pop("search")
    for attacker in arguments.attacker:
        name, named = _named(attacker)
        found = _STRATEGY.fullmatch(named)
        strategy, model = (found[1], found[2]) if found else ("attacker", named)
        kind = strategy.removeprefix("attacker+")
        own = {"pair": ("streams", "turns"), "tap": ("depth", "branching", "width", "roots")}
        suits = (*own.get(kind, ()), *(("keep_last", "retries") if kind in own else ()))
        for target in arguments.target:
            target_name, target_model = _named(target)
            key = (_plain(name or f"{strategy}-{Path(model).name}"), _plain(target_name or Path(target_model).name))
            if key in plans:
                raise InputError(f"--attacker, --target: two are called {key[0]} and {key[1]}; name them NAME=MODEL")
            chosen = {k: v for k, v in search.items() if k in suits}
            plans[key] = make_plan(strategy=strategy, attacker=model, target=target_model, search=chosen, **options)
    return plans


def _named(text: str) -> tuple[str, str]:
    found = _NAMED.fullmatch(text)
    return (found[1], found[2]) if found else ("", text)


def _plain(name: str) -> str:
    """A name that can be part of a folder's."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-.") or "model"


async def _run(
    plans: Mapping[tuple[str, str], Plan],
    seeds: Sequence[Any],
    out: Path,
    purpose: str,
    models: Models,
    parallel: int,
    console: Console,
) -> dict[tuple[str, str], Outcome]:
    budgets = {key: Budget() for key in plans}
    places = asyncio.Semaphore(parallel)
    for note in egress_notes([spec for plan in plans.values() for spec in plan.specs]):
        console.print(note, markup=False, highlight=False)

    def stop() -> None:
        for budget in budgets.values():
            budget.stopping = True

    async def one(key: tuple[str, str], plan: Plan) -> Outcome:
        async with places:
            folder = out / "__".join(key)
            outcome = await engage(plan, seeds, folder, purpose, budgets[key], models=models, view=False, guard=False)
            console.print(f"{' on '.join(key)}: {len(outcome.attempts)} seeds, {budgets[key].queries} target queries")
            return outcome

    try:
        with gentle_stop(stop, console.print):
            async with asyncio.TaskGroup() as group:
                tasks = {key: group.create_task(one(key, plan)) for key, plan in plans.items()}
    finally:
        await models.close()
    return {key: task.result() for key, task in tasks.items()}


def diversity(attempts: Sequence[Attempt], size: int, embed: ModelSpec | None = None) -> Diversity:
    """Of `size` attacks evenly spread over all that were asked, in the order of seeds and queries."""
    asked = [c.prompt for a in attempts for c in sorted(a.candidates, key=lambda c: c.rank) if c.rank]
    if len(asked) < size or size < 2:
        return Diversity(len(asked))
    texts = spread(asked, size)
    tokens = [words(text) for text in texts]
    vectors = None if embed is None else mean_hidden_states(embed, texts)
    cosine = None if vectors is None else mean_cosine(vectors)
    return Diversity(size, self_bleu(texts), distinct_n(tokens, 1), distinct_n(tokens, 2), cosine)


COLUMNS: Mapping[str, Callable[[Cell], str]] = {
    "attack success rate": lambda c: format_rate(c.figures.asr, percent=True),
    "queries a seed": lambda c: format_rate(c.figures.queries_a_seed),
    "queries to success": lambda c: format_rate(c.figures.queries_to_success),
    "faithful": lambda c: _number(c.figures.faithfulness),
    "self-BLEU": lambda c: _number(c.diversity.self_bleu),
    "distinct-1": lambda c: _number(c.diversity.distinct_1),
    "distinct-2": lambda c: _number(c.diversity.distinct_2),
    "cosine": lambda c: _number(c.diversity.cosine),
    "diversity's n": lambda c: str(c.diversity.n),
    "unfinished": lambda c: str(c.figures.seeds - c.figures.finished),
}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short(rate: Estimate | None) -> str:
    return "-" if rate is None else f"{rate.value:.1%} ({rate.low:.0%} to {rate.high:.0%})"


def _write(out: Path, purpose: str, cells: Sequence[Cell], counters: Mapping[str, int]) -> None:
    """`transfer.json` and `transfer.html`; `counters` are the models' own, over all cells of this start."""
    content: dict[str, Any] = {"notice": NOTICE, "purpose": purpose, "cells": [asdict(cell) for cell in cells]}
    content["counters"] = dict(counters)
    write_text_atomically(out / "transfer.json", json.dumps(content, indent=1) + "\n")
    attackers, targets = list(dict.fromkeys(c.attacker for c in cells)), list(dict.fromkeys(c.target for c in cells))
    by_key = {(c.attacker, c.target): c for c in cells}
    body = [
        "<h2>Attack success rate</h2>",
        table(
            ("attacker \\ target", *targets),
            [[escape(a), *(_short(by_key[a, t].figures.asr) for t in targets)] for a in attackers],
        ),
        "<h2>All figures</h2>",
        table(
            ("attacker", "target", *((name,) for name in COLUMNS)),
            [[escape(c.attacker), escape(c.target), *(escape(show(c)) for show in COLUMNS.values())] for c in cells],
        ),
        "<p class=quiet>Means with percentile bootstrap 95 % intervals over seeds. self-BLEU (0 to 100) and cosine: "
        "higher is more alike; distinct-n: higher is more diverse; all over the same number of asked attacks.</p>",
    ]
    write_text_atomically(out / "transfer.html", document("Red-team transfer", purpose, body))


def _tell(console: Console, cells: Sequence[Cell]) -> None:
    shown = Table(title="transfer", title_justify="left")
    for name in ("attacker", "target", *COLUMNS):
        shown.add_column(name)
    for cell in cells:
        shown.add_row(cell.attacker, cell.target, *(show(cell) for show in COLUMNS.values()))
    console.print(shown)
