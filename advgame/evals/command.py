"""What `advgame eval` does: check, run with a progress bar, print one table, export."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advgame.errors import InputError


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder, run, vllm:FOLDER or http://host/v1#name")
    parser.add_argument("--suite", type=Path, metavar="FILE", help="suite file, for example configs/suites/tiny.yaml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the evaluation's folder (default: evals/<suite>)")
    parser.add_argument("--limit", type=int, metavar="N", help="first N rows of every set only")
    parser.add_argument("--fresh", action="store_true", help="refuse a folder that holds an evaluation")
    parser.add_argument("--resume", action="store_true", help="continue what is in --out (the default)")
    parser.add_argument("--rescore", metavar="CLASSIFIER", help="score stored completions again; generates nothing")
    parser.add_argument("--parts", action="store_true", help="print every breakdown (they are exported anyway)")
    parser.add_argument("--show-published", action="store_true", help="print the paper's figures beside yours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "judge", metavar="JUDGE", help="rule, rule?noise=2&bias=1, score@MODEL, compare@MODEL, or a classifier"
    )
    parser.add_argument(
        "--data", default="world", help="labelled file, or `world` (default): exact labels of the tiny world"
    )
    parser.add_argument(
        "--rubric", choices=("compliance", "deflection", "refusal"), default="compliance", help="of judges that score"
    )
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="calls of each question (default 2)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of a judge that samples (default 0.6)")
    parser.add_argument("--limit", type=int, metavar="N", help="first N rows only")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the calls and figures; continued if there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_eval(arguments: argparse.Namespace) -> int:
    """0: done. Raises InputError before anything heavy loads where that can be told."""
    from rich.console import Console

    from advgame.evals.classifiers import check_classifier
    from advgame.evals.evaluate import Evaluation, check, evaluate, open_evaluation, rescore
    from advgame.evals.suites import ClassifierSettings, load_suite, short_classifier
    from advgame.evals.table import export_csv, export_json, make_table

    if arguments.limit is not None and arguments.limit < 1:
        raise InputError("--limit: give 1 or more")
    settings: ClassifierSettings | None = None
    if arguments.rescore:
        if arguments.out is None:
            raise InputError("--rescore: name the evaluation's folder with --out")
        evaluation: Evaluation = open_evaluation(arguments.out)
        named = evaluation.suite.classifiers.get(arguments.rescore)
        settings = named or short_classifier(arguments.rescore, "--rescore")
        spec = check_classifier(settings, "--rescore")
        if spec is not None and spec.endpoint is not None:
            evaluation.notes.append(f"egress: classifier {spec.endpoint.url}, and nothing else leaves this machine")
    else:
        if arguments.suite is None:
            raise InputError("--suite: name a suite file, for example configs/suites/tiny.yaml")
        suite = load_suite(arguments.suite)
        if not arguments.models:
            raise InputError("give at least one MODEL: a folder, a run folder, vllm:FOLDER or http://host:8000/v1#name")
        out = arguments.out or Path("evals") / suite.name
        if arguments.fresh and (out / "eval.json").exists():
            raise InputError(f"{out}: holds an evaluation already; choose another --out, or leave --fresh out")
        evaluation = check(suite, arguments.models, out, arguments.limit)
    console = Console()
    stderr = Console(stderr=True, soft_wrap=True)
    for note in evaluation.notes:
        stderr.print(note, highlight=False)
    shown = len(evaluation.notes)
    with progress(stderr, arguments.quiet) as watch:
        if settings is not None:
            asyncio.run(rescore(evaluation, settings, watch))
        else:
            asyncio.run(evaluate(evaluation, watch))
    for note in evaluation.notes[shown:]:
        stderr.print(f"note: {note}", highlight=False)
    title = f"{evaluation.suite.name}: {evaluation.out}"
    if console.width < 100:
        console.width = 160  # cut off columns say less than wrapped lines
    console.print(
        make_table(evaluation.results, title=title, parts=arguments.parts, published=arguments.show_published)
    )
    more = {"suite": evaluation.suite.name, "counters": dict(evaluation.counters), "notes": evaluation.notes}
    name = f"table-{settings.kind}" if settings is not None else "table"
    for path in (evaluation.out / f"{name}.json", arguments.json):
        if path is not None:
            export_json(evaluation.results, path, more)
    for path in (evaluation.out / f"{name}.csv", arguments.csv):
        if path is not None:
            export_csv(evaluation.results, path)
    return 0


@contextmanager
def progress(console, quiet) -> Iterator:  # type: ignore[no-untyped-def,type-arg]
    """A bar a stage on `console`; yields what starts one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:

        def watch(stage: str):  # type: ignore[no-untyped-def]
            task = bar.add_task(stage, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield watch
