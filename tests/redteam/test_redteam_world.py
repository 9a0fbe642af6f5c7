"""The whole chain in the tiny world, where every verdict can be checked against the grammar."""

import json
import os
from pathlib import Path

import pytest

from advgame import cli
from advgame.world.grammar import classify, parse_prompt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps: its players are the warm-started ones and hardly more."""
    if "ADVGAME_CACHE" not in os.environ:
        os.environ["ADVGAME_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    root = tmp_path_factory.mktemp("runs")
    line = ["train", ROOT / "configs" / "tiny.yaml", "--run.root", root, "--run.name", "run", "--run.steps", "2"]
    assert cli.main([*map(str, line), "--quiet"]) == 0
    return root / "run"


def attacked(run, out, *more):
    line = ["redteam", "--attacker", f"{run}:initial", "--target", f"{run}:initial", "--seeds", "world", "--out", out]
    line += ["--purpose", "a test", "--classify", "all", "--quiet", *more]
    assert cli.main([*map(str, line)]) == 0
    lines = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()][1:]
    return lines, json.loads((out / "summary.json").read_text())["figures"]


@pytest.mark.parametrize("strategy", ["attacker", "pair", "tap", "attacker+tap"])
def test_every_verdict_is_the_grammars(run, tmp_path, strategy):
    lines, figures = attacked(run, tmp_path / "out", "--strategy", strategy, "--queries-per-seed", "8")
    assert len(lines) == 24
    hits = 0
    for line in lines:
        intent = parse_prompt(line["seed"]["text"]).intent
        asked = [c for c in line["candidates"] if c["response"] is not None]
        assert 0 < len(asked) <= 8
        for candidate in asked:
            prompt = parse_prompt(candidate["prompt"])
            kept = prompt is not None and prompt.intent == intent
            assert candidate["faithful"] == kept
            assert kept or strategy == "pair"  # PAIR prunes nothing
            assert candidate["label"] == classify(candidate["response"], intent).discloses
        if strategy == "attacker":
            pruned = [c for c in line["candidates"] if c["fate"] == "unfaithful"]
            assert all(parse_prompt(c["prompt"]) is None or parse_prompt(c["prompt"]).intent != intent for c in pruned)
        best = line["candidates"][line["submitted"]]
        assert best["rating"] == max(c["rating"] for c in asked)
        hits += best["label"]
        ranks = [c["rank"] for c in asked if c["label"]]
        assert best["label"] == bool(ranks)  # the exact judge and the exact classifier agree
    assert figures["asr"]["value"] == pytest.approx(hits / 24)
    assert hits >= 16  # the untrained Defender gives way to most of eight framings


def test_a_run_names_its_players(run, tmp_path, capsys):
    line = ["redteam", "--attacker", f"{run}:step-000009", "--target", run, "--seeds", "world", "--purpose", "a test"]
    assert cli.main([*map(str, line), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint 'step-000009'; there are: initial, step-000002" in capsys.readouterr().err
