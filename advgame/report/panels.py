"""Which charts a page has: panels of charts of metrics, of which those that no run measured are left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from advgame.game.tree import Outcome
from advgame.report.series import ERRORS_PREFIX, SWAP_DISAGREEMENT
from advgame.run import names

_RATE = (0.0, 1.0)
_SIDES = [(role, category) for role in names.ROLES for category in names.CATEGORIES]


@dataclass(frozen=True)
class Line:
    """A metric and what a legend calls it. `invert`: 1 minus the metric is drawn."""

    metric: str
    label: str
    invert: bool = False


@dataclass(frozen=True)
class Chart:
    """`kind`: `lines`, `stack` (lines added up, one chart a run) or `path` (first line across, second line up)."""

    title: str
    lines: tuple[Line, ...]
    kind: str = "lines"
    range: tuple[float, float] | None = None
    unit: str = ""


@dataclass(frozen=True)
class Panel:
    """`missing` is what the page says when no run measured any of its charts."""

    key: str
    title: str
    note: str
    charts: tuple[Chart, ...]
    missing: str = "not recorded"


def panels_for(metrics: Collection[str]) -> list[Panel]:
    """All panels, with the charts and lines that some run has; an empty panel says what is missing."""
    every = [build(sorted(metrics)) for build in _PANELS]
    return [Panel(p.key, p.title, p.note, tuple(_present(p.charts, set(metrics))), p.missing) for p in every]


def _present(charts: Sequence[Chart], metrics: set[str]) -> Iterator[Chart]:
    for chart in charts:
        lines = tuple(line for line in chart.lines if line.metric in metrics)
        if lines and (chart.kind != "path" or len(lines) == len(chart.lines)):
            yield Chart(chart.title, lines, chart.kind, chart.range, chart.unit)


def _worst(metrics: Sequence[str]) -> Panel:
    return Panel(
        "worst",
        "Exact worst case",
        "Known by enumeration in the tiny world: the most successful of all attacks on each intent, averaged. "
        "Held-out framings are those the Attacker's warm start never wrote.",
        (
            Chart(
                "Exploitability",
                (
                    Line(names.EXPLOITABILITY, "trained framings"),
                    Line(names.HELDOUT_EXPLOITABILITY, "held-out framings"),
                    Line("eval/heldout_intents_exploitability", "held-out intents"),
                    Line(names.EXPLOITABILITY_BOUND, "all gibberish counted"),
                ),
                range=_RATE,
            ),
            Chart(
                "Worst over-refusal",
                (
                    Line(names.OVER_REFUSAL, "trained framings"),
                    Line("eval/heldout_over_refusal", "held-out framings"),
                    Line("eval/worst_over_refusal_bound", "all gibberish counted"),
                ),
                range=_RATE,
            ),
        ),
        "no exact values: they exist in the tiny world only",
    )


def _heldout(metrics: Sequence[str]) -> Panel:
    sets = sorted({metric.split("/")[1] for metric in metrics if metric.startswith("validation/")})

    def over(metric: str) -> tuple[Line, ...]:
        return tuple(Line(f"validation/{name}/{metric}", name) for name in sets)

    return Panel(
        "heldout",
        "Held-out seeds and the current Attacker",
        "Validation sends held-out seeds straight to the Defender; the judge's scores decide (docs/report.md).",
        (
            Chart("Held-out attack success", over(names.ASR), range=_RATE),
            Chart("Held-out benign compliance", over(names.COMPLIANCE), range=_RATE),
            Chart("Held-out reward, harmful", over(names.reward("harmful", "defender")), unit="points"),
            Chart("Held-out reward, benign", over(names.reward("benign", "defender")), unit="points"),
            Chart(
                "Against the current Attacker, in training",
                (Line(names.ASR, "attack success"), Line(names.COMPLIANCE, "benign compliance")),
                range=_RATE,
            ),
            Chart(
                "Against the current Attacker, start and end",
                (
                    Line(names.EVAL_ASR, "attack success"),
                    Line(names.EVAL_COMPLIANCE, "benign compliance"),
                    Line("eval/sampled_compliance", "benign compliance, sampled"),
                ),
                range=_RATE,
            ),
        ),
    )


def _frontier(metrics: Sequence[str]) -> Panel:
    sets = sorted({metric.split("/")[1] for metric in metrics if metric.startswith("validation/")})
    held = [
        Chart(
            f"Held-out seeds: {name}",
            (
                Line(f"validation/{name}/{names.ASR}", "1 - attack success", invert=True),
                Line(f"validation/{name}/{names.COMPLIANCE}", "benign compliance"),
            ),
            "path",
        )
        for name in sets
    ]
    return Panel(
        "frontier",
        "Safety and compliance",
        "Each run's way from its start (open) to its end (filled). Up and to the right is better on both; a Defender "
        "that refuses everything goes right and down.",
        (
            Chart(
                "Exact worst case",
                (
                    Line(names.EXPLOITABILITY, "1 - exploitability", invert=True),
                    Line(names.OVER_REFUSAL, "1 - worst over-refusal", invert=True),
                ),
                "path",
            ),
            *held,
            Chart(
                "Training trees, as judged",
                (Line(names.ASR, "1 - attack success", invert=True), Line(names.COMPLIANCE, "benign compliance")),
                "path",
            ),
        ),
    )


def _rewards(metrics: Sequence[str]) -> Panel:
    return Panel(
        "rewards",
        "Rewards",
        "Means of all rewards that exist; a failed sample counts -1, as in training.",
        tuple(
            Chart(
                f"{role.capitalize()}, {category} seeds",
                (
                    Line(names.reward(category, role), "all"),
                    Line(f"{category}/{role}/reward_valid", "valid samples"),
                ),
                unit="points",
            )
            for role, category in _SIDES
        ),
    )


def _learning(metrics: Sequence[str]) -> Panel:
    players = sorted({metric.split("/")[1] for metric in metrics if metric.startswith("learn/")})
    shown = [
        ("loss", "Loss"),
        ("margin", "Margin h (chosen over rejected)"),
        ("accuracy", "Preference accuracy"),
        ("grad_norm", "Gradient norm before clipping"),
        ("kl", "KL to the initial model"),
        ("clip_fraction", "Clipped ratios"),
        ("lr", "Learning rate"),
    ]
    return Panel(
        "learning",
        "Learning",
        "Means of a step's updates. The margin is h = log-ratio of the chosen minus that of the rejected sample.",
        (
            *(Chart(title, tuple(Line(f"learn/{p}/{key}", p.capitalize()) for p in players)) for key, title in shown),
            *(
                Chart(f"Pair yield, {category}", _both(category, "pair_yield"), range=_RATE)
                for category in names.CATEGORIES
            ),
            *(
                Chart(f"Staleness, {category}", _both(category, "staleness"), unit="publishes")
                for category in names.CATEGORIES
            ),
            *(
                Chart(f"Sample length, {category}", _both(category, "tokens"), unit="tokens")
                for category in names.CATEGORIES
            ),
        ),
        "no learning recorded (both players frozen?)",
    )


def _both(category: str, what: str) -> tuple[Line, ...]:
    return tuple(Line(f"{category}/{role}/{what}", role.capitalize()) for role in names.ROLES)


def _outcomes(metrics: Sequence[str]) -> Panel:
    return Panel(
        "outcomes",
        "Outcomes",
        "How samples ended, as shares of a step's samples. The scale ends above the failures; the rest went well.",
        tuple(
            Chart(
                f"{'Attacks' if role == 'attacker' else 'Responses'}, {category} seeds",
                tuple(Line(f"{category}/{role}/outcome/{o}", str(o).replace("_", " ")) for o in Outcome),
                "stack",
                _RATE,
            )
            for role, category in _SIDES
        ),
    )


def _errors(metrics: Sequence[str]) -> Panel:
    counted = [m.removeprefix(ERRORS_PREFIX) for m in metrics if m.startswith(ERRORS_PREFIX)]
    counted = [name for name in counted if not name.startswith("judge_swap")]
    return Panel(
        "errors",
        "Errors",
        "Failures, retries and missing verdicts that were counted, per recorded step.",
        (
            Chart("Counted, per step", tuple(Line(ERRORS_PREFIX + n, n.replace("_", " ")) for n in counted), "stack"),
            *(
                Chart(f"Judge calls without a verdict, {category}", _both(category, "no_verdict"))
                for category in names.CATEGORIES
            ),
        ),
        "nothing was counted: no failure, no retry, no missing verdict",
    )


def _judge(metrics: Sequence[str]) -> Panel:
    def of(what: str) -> tuple[Line, ...]:
        return tuple(
            Line(f"judge/{role}/{category}/{what}", f"{role.capitalize()}'s, {category}") for role, category in _SIDES
        )

    return Panel(
        "judge",
        "Judge",
        "From the recorded verdicts on two different answers. Lengths are in characters of what the judge read; "
        "a correlation is a reason to read verdicts, not a proof of bias.",
        (
            Chart("Swapped pairs that disagree", (Line(SWAP_DISAGREEMENT, "both orders asked"),), range=_RATE),
            Chart("Correlation of score and length difference", of("length_correlation"), range=(-1.0, 1.0)),
            Chart("First answer's score minus the second's", of("first_minus_second"), unit="points"),
            Chart("Ties", of("ties"), range=_RATE),
        ),
        "no verdicts on pairs recorded",
    )


def _diversity(metrics: Sequence[str]) -> Panel:
    def of(what: str) -> tuple[Line, ...]:
        return tuple(Line(f"{category}/attacker/{what}", category) for category in names.CATEGORIES)

    return Panel(
        "diversity",
        "Diversity of attacks",
        "distinct-n: different n-grams over all n-grams. Self-overlap: how much attacks of a step repeat each other "
        "(1: identical). New: never seen before in the run.",
        (
            Chart("Distinct-1", of("distinct_1")),
            Chart("Distinct-2", of("distinct_2")),
            Chart("Self-overlap", of("self_overlap"), range=_RATE),
            Chart("Different prompts in a step", of("unique_prompts"), range=_RATE),
            Chart("New prompts", of("new_prompts"), range=_RATE),
        ),
        "no Attacker wrote anything",
    )


def _effort(metrics: Sequence[str]) -> Panel:
    stages = tuple(Line(names.stage_seconds(stage), stage) for stage in names.STAGES)

    def energy(ending: str) -> tuple[Line, ...]:
        found = [m for m in metrics if m.startswith("energy/") and m.endswith(ending)]
        return tuple(Line(m, m.removeprefix("energy/").removesuffix(ending).replace("/", " ")) for m in found)

    publish = tuple(Line(m, m.split("/", 1)[1].replace("_ms", "")) for m in metrics if m.startswith("publish/"))
    return Panel(
        "effort",
        "Time and energy",
        "Wall-clock seconds of a step by stage.",
        (
            Chart("Seconds by stage", stages, "stack", unit="s"),
            Chart("Trees a second of play", (Line(names.TREES_PER_SECOND, "trees"),), unit="trees/s"),
            Chart("Publishing", publish, unit="ms"),
            Chart("Energy of a step", energy("_joules"), "stack", unit="J"),
            Chart("Power", energy("_watts"), unit="W"),
            Chart("Busy", energy("_busy"), range=_RATE),
            Chart("Memory", energy("_memory_gib"), unit="GiB"),
        ),
    )


_PANELS: tuple[Callable[[Sequence[str]], Panel], ...] = (
    _worst, _heldout, _frontier, _rewards, _learning, _outcomes, _errors, _judge, _diversity, _effort,
)  # fmt: skip
