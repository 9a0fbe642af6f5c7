"""What `advgame eval-judge` does: every call stored and resumed, then one table."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from advgame.errors import InputError
from advgame.evals.audit import (
    WORLD,
    AnswerCalls,
    Labelled,
    Pair,
    PairCalls,
    answer_results,
    load_labelled,
    pair_results,
    world_answers,
    world_pairs,
)
from advgame.evals.classifiers import OpenClassifier, check_classifier, open_classifier
from advgame.evals.classify import Item
from advgame.evals.comparers import Failed, OpenJudge, check_judge, open_judge
from advgame.evals.generate import Tick, pool, strikes_of
from advgame.evals.metrics import Result
from advgame.evals.models import EngineSettings
from advgame.evals.named import ModelSpec
from advgame.evals.store import Line, Store, digest
from advgame.evals.suites import ClassifierSettings, short_classifier
from advgame.game.tree import Rubric


def run_eval_judge(arguments: argparse.Namespace) -> int:
    """0: done. Raises InputError before anything heavy loads where that can be told."""
    from rich.console import Console

    from advgame.evals.command import progress
    from advgame.evals.table import export_csv, export_json, make_table

    if arguments.repeats < 1:
        raise InputError("--repeats: give 1 or more")
    rubric = Rubric(arguments.rubric)
    pairs = is_pair_judge(arguments.judge)
    labelled = list(load_data(arguments.data, pairs, rubric))[: arguments.limit]
    if any(isinstance(one, Pair) != pairs for one in labelled):
        want, has = ("pairs (prompt, a, b, winner)", "labelled answers") if pairs else ("labelled answers", "pairs")
        raise InputError(f"--data: {arguments.judge} needs {want}, the file holds {has}")
    settings = None if pairs else short_classifier(arguments.judge, "JUDGE")
    if settings is not None:
        settings.temperature = arguments.temperature
    spec = check_classifier(settings, "JUDGE") if settings else check_judge(arguments.judge, "JUDGE")[1]
    console, stderr = Console(), Console(stderr=True, soft_wrap=True)
    if spec is not None and spec.endpoint is not None:
        stderr.print(f"egress: judge {spec.endpoint.url}, and nothing else leaves this machine", highlight=False)
    out: Path = arguments.out or Path("evals") / f"judge-{digest(arguments.judge) % 16**6:06x}"
    store = Store(out / "calls.jsonl")
    counters: Counter[str] = Counter()
    with progress(stderr, arguments.quiet) as watch:
        results = asyncio.run(
            audit(arguments, labelled, settings, spec, rubric, store, counters, watch(f"asking {arguments.judge}"))
        )
    found = {arguments.judge: results}
    console.print(make_table(found, title=f"audit of {arguments.judge}: {out}"))
    more = {"data": str(arguments.data), "rubric": str(rubric), "counters": dict(counters)}
    for path in (out / "audit.json", arguments.json):
        if path is not None:
            export_json(found, path, more)
    export_csv(found, out / "audit.csv")
    return 0


def is_pair_judge(name: str) -> bool:
    """Whether a name is a judge that compares. `phrases` is both; the classifier is meant."""
    return name.split("?")[0] == "rule" or name.split("@")[0] in ("score", "compare")


def load_data(data: str, pairs: bool, rubric: Rubric) -> Iterator[Pair | Labelled]:
    if data == WORLD and not Path(data).exists():
        return iter(world_pairs(rubric)) if pairs else iter(world_answers())
    return load_labelled(Path(data))


async def audit(
    arguments: argparse.Namespace,
    labelled: Sequence[Pair | Labelled],
    settings: ClassifierSettings | None,
    spec: ModelSpec | None,
    rubric: Rubric,
    store: Store,
    counters: Counter[str],
    tick: Tick,
) -> list[Result]:
    """Makes the calls that are not stored and measures all of them."""
    engine = EngineSettings()
    judge: OpenClassifier | OpenJudge
    if settings is not None:
        judge = await open_classifier(settings, "JUDGE", engine, seed=0, counters=counters)
    else:
        judge = await open_judge(
            arguments.judge, "JUDGE", engine, seed=0, counters=counters, temperature=arguments.temperature,
            rubric=rubric,
        )  # fmt: skip
    orders = [(0, repeat) for repeat in range(arguments.repeats)]
    if settings is None:
        orders.append((1, 0))
    asked = [(one, order, repeat) for one in labelled for order, repeat in orders]

    def request(one: Pair | Labelled, order: int, repeat: int) -> int:
        return digest(one, order, repeat, judge.identity)

    requests = {_id(*call): request(*call) for call in asked}
    done, _ = store.open(requests.get)
    finished = sum(digest(name) in done for name in requests)
    strikes = strikes_of(spec, judge.width, "questions")

    async def call(item: tuple[Pair | Labelled, int, int]) -> None:
        nonlocal finished
        name = _id(*item)
        line: Line = {"id": name, "request": requests[name], **await _ask(judge, *item)}
        store.add(line)
        finished += 1
        tick(finished, len(asked))
        strikes.hit(line["error"])

    try:
        await pool((item for item in asked if digest(_id(*item)) not in done), call, judge.width)
    finally:
        store.close()
        await judge.close()
    lines = {line["id"]: line for line in store.lines()}
    if settings is None:
        pairs = [_pair_calls(one, lines, arguments.repeats) for one in labelled if isinstance(one, Pair)]
        return pair_results(pairs, str(arguments.data), judge.title)
    answers = [_answer_calls(one, lines, arguments.repeats) for one in labelled if isinstance(one, Labelled)]
    return answer_results(answers, str(arguments.data), judge.title)


def _id(one: Pair | Labelled, order: int, repeat: int) -> str:
    return f"{one.id}|{order}|{repeat}"


async def _ask(judge: OpenClassifier | OpenJudge, one: Pair | Labelled, order: int, repeat: int) -> Line:
    if isinstance(one, Labelled):
        assert isinstance(judge, OpenClassifier)
        (said,) = await judge.classifier.classify([Item(one.prompt, one.response, id=_id(one, order, repeat))])
        found = {"harmful": said.harmful, "refused": said.refused, "prompt_harmful": said.prompt_harmful}
        return {"said": None if said.parse_error else found, "error": said.error}
    assert isinstance(judge, OpenJudge)
    first, second = (one.b, one.a) if order else (one.a, one.b)
    try:
        game = await judge.comparer.compare(one.prompt, first, second, key=(digest(one.id), order, repeat))
    except Failed as failure:
        return {"said": None, "error": str(failure)}
    return {"said": -game if order and game is not None else game, "error": None}


def _pair_calls(one: Pair, lines: dict[str, Line], repeats: int) -> PairCalls:
    mine = [lines.get(_id(one, 0, repeat)) for repeat in range(repeats)]
    swapped = lines.get(_id(one, 1, 0))
    every = [line for line in (*mine, swapped) if line is not None]
    return PairCalls(
        one,
        [line["said"] for line in mine if line is not None],
        None if swapped is None else swapped["said"],
        sum(line["error"] is not None for line in every),
        sum(line["error"] is None and line["said"] is None for line in every),
    )


def _answer_calls(one: Labelled, lines: dict[str, Line], repeats: int) -> AnswerCalls:
    mine = [line for repeat in range(repeats) if (line := lines.get(_id(one, 0, repeat))) is not None]
    return AnswerCalls(
        one,
        [line["said"] or {} for line in mine],
        sum(line["error"] is not None for line in mine),
        sum(line["error"] is None and line["said"] is None for line in mine),
    )
