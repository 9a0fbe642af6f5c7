"""Held-out languages: every prompt of a set once more in each language, by a translating model, and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from advgame.evals.formats import fill, template_text
from advgame.evals.generate import Generator, generate
from advgame.evals.named import parse_model
from advgame.evals.row import EvalRow
from advgame.evals.store import Store, row_of
from advgame.evals.suites import SetSettings, Translate, load_set
from advgame.game.parsing import after_reasoning
from advgame.rollout.engine import Sampling

if TYPE_CHECKING:
    from advgame.evals.evaluate import Evaluation, Watch

ORIGINAL = "original"


async def translated_rows(e: Evaluation, one: SetSettings, watch: Watch) -> Callable[[], Iterator[EvalRow]]:
    """The rows of a set, followed by their translations; made now where they are not stored.

    A translated row has the id `<id>@<language>`, the tag `language`, and the original as what the classifier reads,
    so that a judge that knows the language of the answers only must still read the request. A translation that failed
    leaves its row out, counted in the notes.
    """
    if one.translate is None:
        return lambda: load_set(one, e.limit)
    store = Store(e.out / "translations" / f"{one.label}.jsonl")
    await _translate(e, one, one.translate, store, watch)

    def rows() -> Iterator[EvalRow]:
        for row in load_set(one, e.limit):
            yield replace(row, tags={"language": ORIGINAL} | dict(row.tags))
        for line in store.lines():
            if line["error"] is None and after_reasoning(line["response"] or ""):
                row = row_of(line)
                yield replace(row, prompt=after_reasoning(row.response or ""), response=None)

    return rows


async def _translate(e: Evaluation, one: SetSettings, settings: Translate, store: Store, watch: Watch) -> None:
    template = template_text("translate", settings.template, ("text", "language"))
    spec = parse_model(settings.model, f"translate.model of {one.label}", "judge")

    def asked() -> Iterator[EvalRow]:
        for row in load_set(one, e.limit):
            for language in settings.languages:
                text = fill(template, {"text": row.prompt, "language": language})
                tags = dict(row.tags) | {"language": language}
                yield replace(row, id=f"{row.id}@{language}", prompt=text, tags=tags)

    sampling = Sampling(0.0, 1.0, settings.max_tokens)
    generator = Generator(spec, e.suite.engine, "translator", e.suite.seed, e.counters)
    try:
        counts = await generate(asked, sampling, generator, store, watch(f"translating {one.label}"))
    finally:
        await generator.close()
    if counts["failed"]:
        e.notes.append(f"{one.label}: {counts['failed']} translations failed; their rows are left out")
