"""A whole evaluation: check everything, generate, classify, compare, measure; each part resumes from what is stored.

The folder of an evaluation:

    eval.json                                 what was asked for: suite, models, versions, hosts that were talked to
    completions/<model>/<set>.jsonl           one line a row, with all that another classifier needs
    verdicts/<model>/<set>/<classifier>.jsonl one line a row
    games/<model>/<set>.jsonl                 both orders of every comparison
    utility/<model>.json                      what lm-evaluation-harness measured
    table.json, table.csv                     every figure
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from advgame import __version__
from advgame.errors import InputError
from advgame.evals.classifiers import check_classifier, open_classifier
from advgame.evals.comparers import check_judge, game_results, open_judge, play_games
from advgame.evals.generate import Generator, Tick, generate, sampling_of, strikes_of
from advgame.evals.metrics import Result, scoreboard
from advgame.evals.named import ModelSpec, parse_model, short_names
from advgame.evals.pairwise import Question, load_alpaca, load_arena
from advgame.evals.row import EvalRow
from advgame.evals.row_index import RowIndex
from advgame.evals.score import classify_store, results_of
from advgame.evals.stats import Estimate
from advgame.evals.store import Store, digest
from advgame.evals.suites import ClassifierSettings, PairwiseSettings, SetSettings, Suite, UtilitySettings, load_set
from advgame.evals.translate import translated_rows
from advgame.evals.utility import run_utility
from advgame.rollout.engine import Sampling
from advgame.run.folder import write_text_atomically

Watch = Callable[[str], Tick]
"""Starts a stage by its name; what it returns is told (done, all)."""


@dataclass
class Evaluation:
    """What `advgame eval` was asked for, checked. `results`: figures by the model's short name."""

    suite: Suite
    models: list[ModelSpec]
    out: Path
    limit: int | None = None
    counters: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    results: dict[str, list[Result]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return short_names(self.models)

    def completions(self, model: str, name: str) -> Store:
        return Store(self.out / "completions" / model / f"{name}.jsonl")

    def verdicts(self, model: str, name: str, classifier: str) -> Store:
        file = re.sub(r"[^\w.-]+", "_", classifier) + ".jsonl"
        return Store(self.out / "verdicts" / model / name / file)

    def games(self, model: str, name: str) -> Store:
        return Store(self.out / "games" / model / f"{name}.jsonl")


def check(suite: Suite, models: list[str], out: Path, limit: int | None) -> Evaluation:
    """Models, classifiers, judges and the first row of every file; loads no weights and sends nothing."""
    specs = [parse_model(text, "MODEL") for text in models]
    evaluation = Evaluation(suite, specs, out, limit)
    hosts = {f"target {spec.text.partition('?')[0]}" for spec in specs if spec.endpoint is not None}
    for one in suite.sets:
        settings = suite.classifier_of(one)
        spec = check_classifier(settings, f"classifier of {one.label}")
        if spec is not None and spec.endpoint is not None:
            hosts.add(f"classifier {spec.endpoint.url}")
        if one.translate is not None:
            translator = parse_model(one.translate.model, f"translate.model of {one.label}", "judge")
            if translator.endpoint is not None:
                hosts.add(f"translator {translator.endpoint.url}")
        next(load_set(one, 1), None)
    for pair in suite.pairwise:
        _, judge, _ = check_judge(pair.judge, f"judge of {pair.label}")
        if judge is not None and judge.endpoint is not None:
            hosts.add(f"judge {judge.endpoint.url}")
        next(questions_of(pair, 1), None)
    evaluation.notes += [f"egress: {host}, and nothing else leaves this machine" for host in sorted(hosts)]
    return evaluation


def questions_of(pair: PairwiseSettings, limit: int | None) -> Iterator[Question]:
    most = min((n for n in (limit, pair.limit) if n is not None), default=None)
    found = load_alpaca(pair.path) if pair.set == "alpaca-eval" else load_arena(pair.path, pair.baseline)
    for number, question in enumerate(found):
        if most is not None and number >= most:
            return
        yield question


async def evaluate(e: Evaluation, watch: Watch) -> None:
    """Runs everything that is not stored yet and fills `e.results`. Raises InputError or EngineError."""
    e.out.mkdir(parents=True, exist_ok=True)
    write_manifest(e)
    rows = {one.label: await translated_rows(e, one, watch) for one in e.suite.sets}
    for spec, name in zip(e.models, e.names, strict=True):
        await _complete(e, spec, name, rows, watch)
    for one in e.suite.sets:
        settings = e.suite.classifier_of(one)
        wanted = RowIndex()
        for row in rows[one.label]():
            wanted.add(digest(row.id))
        for name, results in (await classify_set(e, one, settings, watch, wanted)).items():
            e.results.setdefault(name, []).extend(results)
    for pair in e.suite.pairwise:
        await _compare(e, pair, watch)
    for spec, name in zip(e.models, e.names, strict=True):
        for task in e.suite.utility:
            e.results.setdefault(name, []).extend(_utility(e, spec, name, task, watch))


async def _complete(
    e: Evaluation, spec: ModelSpec, name: str, rows: dict[str, Callable[[], Iterator[EvalRow]]], watch: Watch
) -> None:
    """One model's completions of every set; the model is loaded if a row lacks one."""
    generator = Generator(spec, e.suite.engine, "target", e.suite.seed, e.counters)
    asked: list[tuple[str, Callable[[], Iterator[EvalRow]], Sampling]] = [
        (one.label, rows[one.label], sampling_of(one, one.generation)) for one in e.suite.sets
    ]
    asked += [
        (pair.label, partial(_asked, pair, e.limit), sampling_of(None, pair.generation)) for pair in e.suite.pairwise
    ]
    try:
        for label, source, sampling in asked:
            counts = await generate(source, sampling, generator, e.completions(name, label), watch(f"{name}: {label}"))
            _note(e, f"{name}, {label}", counts)
    finally:
        await generator.close()


def _asked(pair: PairwiseSettings, limit: int | None) -> Iterator[EvalRow]:
    return (question.row for question in questions_of(pair, limit))


async def classify_set(
    e: Evaluation,
    one: SetSettings,
    settings: ClassifierSettings,
    watch: Watch,
    wanted: RowIndex | None,
    *,
    labels: bool = True,
) -> dict[str, list[Result]]:
    """Every model's completions of one set, classified and measured; a classifier that is not needed is not opened."""
    field = f"classifier of {one.label}"
    spec = check_classifier(settings, field)
    found: dict[str, list[Result]] = {}
    opened = await open_classifier(settings, field, e.suite.engine, seed=e.suite.seed, counters=e.counters)
    try:
        for name in e.names:
            completions, verdicts = e.completions(name, one.label), e.verdicts(name, one.label, opened.classifier.name)
            counts = await classify_store(
                completions, verdicts, opened.classifier, opened.identity, width=opened.width,
                tick=watch(f"{name}: {one.label} by {opened.title}"), wanted=wanted, labels=labels,
                strikes=strikes_of(spec, opened.width, "classifications"),
            )  # fmt: skip
            title = f"labels in the file, {opened.title}" if counts["labels"] else opened.title
            board = scoreboard(one.set, one.convention, one.by)
            found[name] = results_of(verdicts, board, one.label, title, e.suite.seed, wanted)
    finally:
        await opened.close()
    return found


async def _compare(e: Evaluation, pair: PairwiseSettings, watch: Watch) -> None:
    _, spec, _ = check_judge(pair.judge, f"judge of {pair.label}")
    judge = await open_judge(
        pair.judge, f"judge of {pair.label}", e.suite.engine, seed=e.suite.seed, counters=e.counters,
        max_tokens=pair.max_tokens,
    )  # fmt: skip
    try:
        for name in e.names:
            games = e.games(name, pair.label)
            await play_games(
                lambda: questions_of(pair, e.limit), e.completions(name, pair.label), games, judge,
                watch(f"{name}: {pair.label} by {judge.title}"), strikes_of(spec, judge.width, "comparisons"),
            )  # fmt: skip
            results = game_results(games, pair.set, pair.label, judge.title, e.suite.seed)
            e.results.setdefault(name, []).extend(results)
    finally:
        await judge.close()


def _utility(e: Evaluation, spec: ModelSpec, name: str, task: UtilitySettings, watch: Watch) -> list[Result]:
    """The harness's figures, from the folder if they were measured with the same settings and weights."""
    path = e.out / "utility" / f"{name}.json"
    key = str(digest(task.model_dump_json(), spec.identity(), e.limit, e.suite.seed))
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key not in stored:
        watch(f"{name}: {', '.join(task.tasks)} by lm-evaluation-harness")(0, 1)
        results = run_utility(task, spec, e.suite.engine, limit=e.limit, seed=e.suite.seed)
        stored[key] = [asdict(result) for result in results]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(stored, indent=1) + "\n")
    return [Result(**fields | {"estimate": Estimate(**fields["estimate"])}) for fields in stored[key]]


def _note(e: Evaluation, what: str, counts: Counter[str]) -> None:
    told = [f"{counts[key]} {word}" for key, word in (
        ("failed", "failed (the same command tries them again)"), ("dropped", "old ones made anew"),
        ("cut", "cut off at the token limit"), ("reasoned", "with reasoning, which is stored and not judged"),
    ) if counts[key]]  # fmt: skip
    if told:
        e.notes.append(f"{what}: {', '.join(told)}")


def write_manifest(e: Evaluation) -> None:
    """`eval.json`: enough to score the folder again, and to know what was run."""
    models = {name: {"model": s.text, "identity": s.identity()} for name, s in zip(e.names, e.models, strict=True)}
    tree = {
        "advgame": __version__,
        "python": platform.python_version(),
        "suite": e.suite.model_dump(mode="json"),
        "models": models,
        "limit": e.limit,
        "egress": [note for note in e.notes if note.startswith("egress")],
    }
    write_text_atomically(e.out / "eval.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def open_evaluation(out: Path) -> Evaluation:
    """A stored evaluation, for scoring again; its models need not exist any more. InputError if it is none."""
    try:
        tree = json.loads((out / "eval.json").read_text(encoding="utf-8"))
        suite = Suite.model_validate(tree["suite"])
        models = [ModelSpec(one["model"], "MODEL", "transformers", Path(name)) for name, one in tree["models"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out}/eval.json: missing or damaged ({type(error).__name__}); name an evaluation") from error
    return Evaluation(suite, models, out, tree.get("limit"))


async def rescore(e: Evaluation, settings: ClassifierSettings, watch: Watch) -> None:
    """Every stored completion by another classifier; generates nothing. Fills `e.results`."""
    for one in e.suite.sets:
        found = await classify_set(e, one, settings, watch, None, labels=False)
        for name, results in found.items():
            e.results.setdefault(name, []).extend(results)
