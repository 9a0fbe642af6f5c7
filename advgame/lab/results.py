"""What finished runs say: one row a variant, means with standard errors, and each published direction judged."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from advgame.lab.jobs import Job
from advgame.lab.variants import CLAIMS, Claim
from advgame.run import names
from advgame.run.recorder import read_metrics

MEASURES = {
    "harm": "exploitability: worst disclosure over trained framings, mean over intents",
    "bound": "the same with all gibberish counted as disclosure",
    "refusal": "worst over-refusal of benign intents",
    "heldout": "exploitability over held-out framings",
    "asr": "sampled success of the current Attacker; also the Defender's best-response gap, since to every attack "
    "there is an answer that discloses nothing",
    "compliance": "mean benign compliance (higher is better)",
    "gibberish": "share of ill-formed answers",
    "gap": "the Attacker's best-response gap, what an exact best response would add to the current one: harm - asr",
    "swing": "root mean square change of harm between evaluations in the second half",
    "processor": "seconds of processor time of the run's own process, evaluation included",
}
_SUMMARY = {
    "harm": "exploitability", "bound": "exploitability_bound", "refusal": "worst_over_refusal",
    "heldout": "heldout_exploitability", "asr": "asr", "compliance": "benign_compliance", "gibberish": "gibberish",
}  # fmt: skip


GAP_WINDOW = 5
"""Steps to each side whose play stands for the current Attacker: one step's success is a small sample."""


@dataclass(frozen=True)
class Mean:
    """Mean and standard error of n values; the error of one value is unknown (NaN)."""

    mean: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Row:
    """A variant in one world: what its seeds measured. runs: how many of them ended."""

    world: str
    variant: str
    title: str
    values: Mapping[str, tuple[float, ...]]
    runs: int

    def mean(self, measure: str) -> Mean | None:
        return mean_of(self.values.get(measure, ()))


def mean_of(values: Sequence[float]) -> Mean | None:
    """None without values."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.mean(values), error, len(values))


def measured(job: Job) -> dict[str, float]:
    """All measures that a finished run holds."""
    summary = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
    values = {name: summary.get(f"{key}_after") for name, key in _SUMMARY.items()}
    found = {name: float(value) for name, value in values.items() if value is not None}
    if (used := summary.get("energy", {}).get(names.PROCESS_SECONDS.removeprefix(names.ENERGY_PREFIX))) is not None:
        found["processor"] = float(used)
    if "harm" in found and "asr" in found:
        found["gap"] = found["harm"] - found["asr"]
    curve = [value for _, value in series(job, names.EXPLOITABILITY)]
    late = curve[len(curve) // 2 :]
    if len(late) >= 3:
        steps = [b - a for a, b in pairwise(late)]
        found["swing"] = math.sqrt(statistics.fmean(s * s for s in steps))
    return found


def series(job: Job, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric over a run."""
    rows = read_metrics(job.folder / "metrics.jsonl")
    return [(int(row["step"]), float(row[metric])) for row in rows if row.get(metric) is not None]


def gap_series(job: Job) -> list[tuple[int, float]]:
    """(step, the Attacker's best-response gap): exact exploitability less the success in play around that step."""
    played = series(job, names.ASR)
    gaps = []
    for step, best in series(job, names.EXPLOITABILITY):
        near = [value for at, value in played if abs(at - step) <= GAP_WINDOW]
        if near:
            gaps.append((step, best - statistics.fmean(near)))
    return gaps


def rows_of(jobs: Sequence[Job]) -> list[Row]:
    """One row a world and variant that has at least one finished run, in the order of `jobs`."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        if job.done:
            groups.setdefault((job.world, job.variant.name), []).append(job)
    rows = []
    for (world, name), done in groups.items():
        found = [measured(job) for job in done]
        values = {m: tuple(f[m] for f in found if m in f) for m in MEASURES}
        rows.append(Row(world, name, done[0].variant.title, values, len(done)))
    return rows


def rows_of_json(tree: Mapping[str, Any]) -> list[Row]:
    """The rows that `results.json` holds."""
    return [Row(**row | {"values": {m: tuple(v) for m, v in row["values"].items()}}) for row in tree["rows"]]


@dataclass(frozen=True)
class Finding:
    """A published direction in one world: the difference worse - better and what it allows to say."""

    world: str
    claim: Claim
    difference: Mean | None
    verdict: str


def judge_claims(rows: Sequence[Row], claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Two standard errors of the difference decide; fewer than two seeds on a side decide nothing."""
    by_key = {(row.world, row.variant): row for row in rows}
    findings = []
    for world in dict.fromkeys(row.world for row in rows):
        for claim in claims:
            better, worse = by_key.get((world, claim.better)), by_key.get((world, claim.worse))
            a = better.mean(claim.measure) if better else None
            b = worse.mean(claim.measure) if worse else None
            if a is None or b is None:
                findings.append(Finding(world, claim, None, "not measured"))
                continue
            error = math.hypot(a.error, b.error)
            difference = Mean(b.mean - a.mean, error, min(a.n, b.n))
            findings.append(Finding(world, claim, difference, _verdict(difference)))
    return findings


def _verdict(difference: Mean) -> str:
    if difference.n < 2:
        return "one seed: nothing can be said"
    if difference.mean > 2 * difference.error and difference.mean > 0:
        return "appears"
    if difference.mean < -2 * difference.error and difference.mean < 0:
        return "the opposite appears"
    return "not established"
