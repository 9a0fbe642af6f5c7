"""Verdicts on stored completions, and the metrics of stored verdicts; neither generates anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator

from advgame.evals.classify import Classifier, Verdict
from advgame.evals.generate import Strikes, Tick, pool
from advgame.evals.metrics import Result, Scoreboard
from advgame.evals.row import EvalRow
from advgame.evals.row_index import RowIndex
from advgame.evals.store import Line, Store, digest, item_of, row_of, verdict_line, verdict_of
from advgame.game.parsing import after_reasoning

NO_PROMPT = Verdict(harmful=False, refused=True, raw="the attack found no prompt")


def verdict_request(row: EvalRow, identity: str, *, labels: bool) -> int:
    """Names what was judged by whom; a stored verdict with another one is asked for anew."""
    by = f"label {row.label}" if labels and row.label is not None else identity
    answer = row.response and after_reasoning(row.response)
    return digest(row.judged, answer, row.context or "", by)


async def classify_store(
    completions: Store,
    verdicts: Store,
    classifier: Classifier,
    identity: str,
    *,
    width: int,
    tick: Tick,
    wanted: Container[int] | None = None,
    labels: bool = True,
    strikes: Strikes | None = None,
) -> Counter[str]:
    """Fills `verdicts` for every completion whose id's digest is `wanted` (None: all).

    Returns counts: rows, asked, kept, labels, failed.

    labels: a label that came with a stored completion stands as its verdict. Failed completions get a verdict that
    says so. Raises EngineError when the classifier's server is down; the stores are intact then.
    """

    def rows() -> Iterator[tuple[EvalRow, str | None]]:
        return ((row_of(line), line.get("error")) for line in completions.lines() if _is(line, wanted))

    requests = RowIndex()
    labelled = 0
    for row, _ in rows():
        requests[digest(row.id)] = verdict_request(row, identity, labels=labels)
        labelled += labels and row.label is not None
    done, dropped = verdicts.open(lambda name: requests.get(digest(name)))
    counts = Counter({"rows": len(requests), "dropped": dropped, "kept": sum(key in requests for key in done)})
    counts["labels"] = labelled
    finished = counts["kept"]
    tick(finished, counts["rows"])
    guard = strikes or Strikes(None, "classifications")

    async def one(pair: tuple[EvalRow, str | None]) -> None:
        nonlocal finished
        row, failure = pair
        if failure is not None:
            verdict = Verdict(error=f"completion failed: {failure}")
        elif not row.prompt and not row.response:
            verdict = NO_PROMPT
        elif labels and row.label is not None:
            verdict = Verdict(harmful=row.label, raw="label in the file")
        else:
            (verdict,) = await classifier.classify([item_of(row)])
            counts["asked"] += 1
            guard.hit(verdict.error)
        counts["failed"] += verdict.error is not None
        verdicts.add(verdict_line(row, requests[digest(row.id)], verdict))
        finished += 1
        tick(finished, counts["rows"])

    try:
        await pool((pair for pair in rows() if digest(pair[0].id) not in done), one, width)
    finally:
        verdicts.close()
    return counts


def results_of(
    verdicts: Store, board: Scoreboard, name: str, classifier: str, seed: int, wanted: Container[int] | None = None
) -> list[Result]:
    """The metrics of all stored verdicts that are `wanted`, read one line at a time."""
    for line in verdicts.lines():
        if _is(line, wanted):
            board.add(row_of(line), verdict_of(line))
    return board.results(name, classifier, seed)


def _is(line: Line, wanted: Container[int] | None) -> bool:
    return wanted is None or digest(line["id"]) in wanted
