"""The first table of docs/redteam.md: does a trained Attacker beat PAIR and TAP that an untrained one drives?

scripts/redteam-table.py configs/tiny-hard.yaml --out DIR [--sampling-seeds 10] [--queries 8] [--run RUN]

Trains the config's run (or takes RUN), plays the matrix of docs/redteam.md once for every sampling seed against the
Defender as it was before training, with exact verdicts and the same number of target queries for everybody, and prints
attack success rates and differences: means over sampling seeds, bootstrap 95 % intervals over the seeds that were
attacked. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from advgame import cli
from advgame.evals.stats import Estimate, micro
from advgame.run.folder import write_text_atomically

PURPOSE = "the table of docs/redteam.md"
TRAINED, RIVALS = "trained", ("pair", "tap")


def attackers(run: Path) -> dict[str, str]:
    """Who attacks, by name, as `--attacker` takes it."""
    return {
        "untrained": f"{run}:initial",
        "pair": f"pair@{run}:initial",
        "tap": f"tap@{run}:initial",
        TRAINED: f"{run}",
        "trained+tap": f"attacker+tap@{run}",
    }


def trained_run(config: Path, out: Path, more: Sequence[str]) -> Path:
    run = out / "run"
    if not (run / "config.yaml").is_file():
        words = ["train", str(config), "--run.root", str(out), "--run.name", "run", "--quiet", *more]
    else:
        words = ["resume", str(run), "--quiet"]
    if cli.main(words) != 0:
        raise SystemExit(1)
    return run


def successes(folder: Path) -> dict[str, float]:
    """1.0 or 0.0 by seed of one cell, from its `results.jsonl`."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    return {
        line["seed"]["id"]: float(line["submitted"] is not None and line["candidates"][line["submitted"]]["label"])
        for line in lines
    }


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over sampling seeds, by attacked seed."""
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def told(estimate: Estimate, form: str = ".1f") -> str:
    return f"{100 * estimate.value:{form}} ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a trained run; default: trained now, in --out")
    parser.add_argument("--sampling-seeds", type=int, default=10)
    parser.add_argument("--queries", type=int, default=8, help="target queries a seed")
    parser.add_argument("--only", nargs="+", help="names of attackers; default: all")
    arguments, more = parser.parse_known_args(argv)
    run = arguments.run or trained_run(arguments.config, arguments.out, more)
    named = {k: v for k, v in attackers(run).items() if arguments.only is None or k in arguments.only}
    played: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for number in range(arguments.sampling_seeds):
        folder = arguments.out / f"sampling-{number}"
        words = [word for name, model in named.items() for word in ("--attacker", f"{name}={model}")]
        words += ["--target", f"initial={run}:initial", "--seeds", "world", "--purpose", PURPOSE, "--quiet"]
        words += ["--k", str(arguments.queries), "--streams", str(max(1, arguments.queries // 2)), "--turns", "2"]
        words += ["--queries-per-seed", str(arguments.queries), "--seed", str(number), "--out", str(folder)]
        if cli.main(["redteam", "--transfer", *words]) != 0:
            return 1
        for name in named:
            played[name].append(successes(folder / f"{name}__initial"))
    by_name = {name: means(found) for name, found in played.items()}
    rates = {name: micro(list(found.values())) for name, found in by_name.items()}
    differences = {
        rival: micro([by_name[TRAINED][seed] - by_name[rival][seed] for seed in by_name[rival]])
        for rival in RIVALS
        if rival in by_name and TRAINED in by_name
    }
    print(f"| attacker | {arguments.queries} queries ({arguments.sampling_seeds} sampling seeds) |\n|---|---|")
    for name, rate in rates.items():
        assert rate is not None, "the world has seeds"
        print(f"| {name} | {told(rate)} |")
    for rival, difference in differences.items():
        assert difference is not None, "the world has seeds"
        print(f"| {TRAINED} minus {rival} | {told(difference, '+.1f')} |")
    figures = {
        "rates": {name: vars(rate) for name, rate in rates.items() if rate is not None},
        "trained_minus": {rival: vars(one) for rival, one in differences.items() if one is not None},
    }
    write_text_atomically(arguments.out / "table.json", json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
