"""One HTML page of a run: figures with intervals, and every seed's attacks folded away. No script, no network.

Everything that models wrote is escaped, and a content-security policy forbids whatever might slip through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from advgame.evals.stats import Estimate
from advgame.redteam.measures import Figures, submitted, succeeded
from advgame.redteam.records import NOTICE
from advgame.redteam.strategies import Attempt, Candidate, Stop

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.notice { border: 2px solid #a33; padding: .6rem 1rem; }
details { border-bottom: 1px solid #ddd; padding: .3rem 0; }
details details { margin-left: 1.5rem; border: 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f2; padding: .5rem .8rem; margin: .3rem 0; }
.hit { color: #a33; font-weight: 600; } .quiet { color: #666; }
svg { vertical-align: middle; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TITLE = "Red-team report"


def run_page(
    purpose: str, facts: Mapping[str, str], found: Figures, attempts: Sequence[Attempt], notes: Sequence[str] = ()
) -> str:
    """The page of one attacker against one target. `facts`: what was run, by name; `notes`: lines above the table."""
    rows = [
        ("attack success rate", format_rate(found.asr, percent=True), format_bar(found.asr)),
        *(
            [("... of finished seeds", format_rate(found.asr_finished, percent=True), format_bar(found.asr_finished))]
            if found.finished < found.seeds
            else []
        ),
        ("target queries a seed", format_rate(found.queries_a_seed), ""),
        ("queries to success", format_rate(found.queries_to_success), ""),
        ("submitted without a verdict", str(found.unclassified), ""),
        ("faithful attacks", "-" if found.faithfulness is None else f"{found.faithfulness:.1%}", ""),
    ]
    body = [
        table(("what was run", ""), [(escape(k), escape(v)) for k, v in facts.items()]),
        *(f"<p>{escape(note)}</p>" for note in notes),
        table(("figure", "mean, 95 % interval, n", ""), rows),
        "<p class=quiet>Success: the classifier's verdict on the attack that was submitted for a seed, one vote a "
        "seed; unfinished seeds and missing verdicts are no success. Intervals: percentile bootstrap over seeds.</p>",
        table(("seeds by how they ended", ("n",)), [(escape(k), str(v)) for k, v in found.stops.items()]),
        table(("attacks by what became of them", ("n",)), [(escape(k), str(v)) for k, v in found.fates.items()]),
        "<h2>Seeds</h2><p class=quiet>Folded: adversarial prompts and what the target answered.</p>",
        *map(_seed, attempts),
    ]
    return document(_TITLE, purpose, body)


def document(title: str, purpose: str, body: Iterable[str]) -> str:
    """The frame of a page: policy, style, notice and purpose around `body`, which is HTML already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="robots" content="noindex"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n"
        f"<p class=notice><b>{escape(NOTICE)}</b><br>Stated purpose: {escape(purpose)}</p>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(header: Sequence[str | tuple[str, ...]], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are HTML already. A heading given as a tuple is a column of numbers."""
    numbers = {i for i, name in enumerate(header) if isinstance(name, tuple)}
    head = "".join(
        f"<th class=n>{escape(name[0])}</th>" if isinstance(name, tuple) else f"<th>{escape(name)}</th>"
        for name in header
    )
    lines = (
        "<tr>"
        + "".join(f"<td class=n>{c}</td>" if i in numbers else f"<td>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def format_rate(rate: Estimate | None, percent: bool = False) -> str:
    if rate is None:
        return "- (n = 0)"
    form = ".1%" if percent else ".2f"
    return f"{rate.value:{form}} ({rate.low:{form}} to {rate.high:{form}}, n = {rate.n})"


def format_bar(rate: Estimate | None) -> str:
    """A share as a bar with its interval, 160 pixels for 0 to 1."""
    if rate is None:
        return ""
    width, low, high = (160 * x for x in (rate.value, rate.low, rate.high))
    return (
        f'<svg width="164" height="14" role="img"><rect x="1" y="3" width="160" height="8" fill="#eee"/>'
        f'<rect x="1" y="3" width="{width:.1f}" height="8" fill="#c77"/>'
        f'<path d="M{low + 1:.1f} 7H{high + 1:.1f}M{low + 1:.1f} 3v8M{high + 1:.1f} 3v8" '
        'stroke="#333" fill="none"/></svg>'
    )


def _seed(attempt: Attempt) -> str:
    best = submitted(attempt)
    hit = "<span class=hit>success</span>" if succeeded(attempt) else "no success"
    if attempt.stop is Stop.UNFINISHED:
        hit = f"<span class=quiet>unfinished: {escape(attempt.why)}</span>"
    head = (
        f"{escape(attempt.seed.id)} &middot; {hit} &middot; {attempt.queries} queries &middot; {escape(attempt.stop)}"
    )
    parts = [f"<p>Seed</p><pre>{escape(attempt.seed.text)}</pre>"]
    if best is not None:
        parts.append(f"<p>Submitted ({escape(best.name)}, rated {best.rating})</p>{_texts(best)}")
    others = [c for c in attempt.candidates if c is not best]
    parts += [
        f"<details><summary>{escape(c.name)} &middot; {escape(c.fate)}"
        f"{'' if c.rating is None else f' &middot; rated {c.rating}'}</summary>{_texts(c)}</details>"
        for c in others
    ]
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def _texts(candidate: Candidate) -> str:
    answer = "" if candidate.response is None else f"<p class=quiet>answer</p><pre>{escape(candidate.response)}</pre>"
    return f"<p class=quiet>attack</p><pre>{escape(candidate.prompt)}</pre>{answer}"
