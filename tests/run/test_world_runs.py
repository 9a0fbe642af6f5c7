"""The tiny world end to end: the embedded default meets its target, every variant plays, memory stays flat."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advgame import cli
from advgame.run import names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.yaml"


def train(tmp_path, *words, config=TINY):
    placed = ["--quiet", "--run.root", str(tmp_path), "--run.name", "run"]
    assert cli.main(["train", str(config), *placed, *map(str, words)]) == 0
    return tmp_path / "run"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def resident_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def test_the_embedded_default(tmp_path):
    """`make train`: the worst case falls from most to almost nothing, in bounded time and memory.

    The bounds are docs/tiny-world.md's target for the mean of three seeds, with room for one seed on a busy machine.
    """
    placed = ["--run.root", str(tmp_path), "--run.name", "run"]
    command = [sys.executable, "-m", "advgame.cli", "train", str(TINY), *placed]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    run, memory = tmp_path / "run", {}
    while process.poll() is None:
        step = len(list((run / "trees").glob("*.gz"))) if run.exists() else 0
        if step:
            try:
                memory[step] = resident_mb(process.pid)
            except (OSError, StopIteration):
                break
        time.sleep(0.2)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.splitlines()[-1] == str(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["exploitability_before"] >= 0.70
    assert summary["exploitability_after"] <= 0.15
    assert summary["worst_over_refusal_before"] >= 0.80
    assert summary["worst_over_refusal_after"] <= 0.15
    assert summary["asr_after"] <= summary["asr_before"] / 3
    assert summary["benign_compliance_after"] >= 0.95
    assert summary["gibberish_after"] <= 0.05
    assert 0 <= summary["heldout_exploitability_after"] <= 1
    assert max(memory.values()) < 1500
    early = max(mb for step, mb in memory.items() if step <= 60)
    assert max(memory.values()) < early + 60, "resident memory grows with the steps"


@pytest.mark.parametrize("objective", ["ipo", "grpo"])
def test_other_objectives_improve_the_defender(tmp_path, objective):
    run = train(tmp_path, "--learn.objective", objective, "--run.steps", 120)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["exploitability_after"] < 0.6 * summary["exploitability_before"]
    assert summary["worst_over_refusal_after"] < 0.8 * summary["worst_over_refusal_before"]


VARIANTS = {
    "fixed attacker": ["--attacker.frozen", "true"],
    "fixed defender": ["--defender.frozen", "true"],
    "no ema": ["--rollout.source", "live", "--learn.reference", "initial"],
    "on-policy grpo": ["--learn.objective", "grpo", "--rollout.source", "live", "--learn.importance_weights", "true"],
    "grpo per seed": ["--learn.objective", "grpo", "--learn.baseline", "per_seed", "--learn.aggregate", "token"],
    "point-wise judge": ["--judge.mode", "pointwise"],
    "noisy, biased judge": ["--judge.noise", "1", "--judge.bias", "1"],
    "sequential rounds": ["--learn.schedule", "sequential", "--learn.round_steps", "2"],
    "no faithfulness judge": ["--game.faithfulness", "false"],
    "no attacker judge": ["--game.attacker_judge", "false"],
    "not optimistic": ["--game.optimistic", "false"],
    "direct seeds": ["--game.skip_attacker", "true"],
    "judged against the seed": ["--game.condition_on", "seed"],
    "accumulated": ["--learn.accumulate", "true"],
    "recomputed reference": ["--learn.reference", "recompute"],
    "a and d of 4": ["--game.attacks", "4", "--game.responses", "4"],
    "optional terms": ["--learn.nll_weight", "0.1", "--learn.entropy_weight", "0.01"],
    "length-normalised": ["--learn.length_normalised", "true"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_plays_and_learns(tmp_path, variant, monkeypatch):
    without_exact(monkeypatch)
    run = train(tmp_path, "--run.steps", 4, "--run.validate_every", 0, *VARIANTS[variant])
    played = rows(run)
    learning = {key for row in played for key in row if key.startswith("learn/") and key.endswith("/grad_norm")}
    frozen = {"fixed attacker": {"defender"}, "fixed defender": {"attacker"}, "direct seeds": {"defender"}}
    expected = frozen.get(variant, {"attacker", "defender"})
    if variant == "no attacker judge":
        expected = {"defender", "attacker"}  # valid attacks (0) against failed ones (-1) still make pairs
    assert {key.split("/")[1] for key in learning} == expected
    if variant == "sequential rounds":
        turns = [{k.split("/")[1] for k in row if k.endswith("/grad_norm")} for row in played[:4]]
        assert turns == [{"attacker"}, {"attacker"}, {"defender"}, {"defender"}]


def without_exact(monkeypatch):
    """Variants are played for a few steps; the exact worst case of start and end would be most of the time."""
    monkeypatch.setattr("advgame.run.loop.exact", lambda session: {})


def test_self_redteam(tmp_path, monkeypatch):
    without_exact(monkeypatch)
    run = train(
        tmp_path, "--run.steps", 4, "--run.validate_every", 0, "--game.self_play", "true",
        "--learn.objective", "reinforce", "--rollout.source", "live",
    )  # fmt: skip
    played = rows(run)
    assert all(row["learn/shared/members"] > 100 for row in played[:4])
    for row in played[:4]:
        assert -1 <= row["harmful/attacker/reward"] <= 1
    assert (run / "checkpoints" / "step-000004" / "shared" / "config.json").exists()
    assert not (run / "checkpoints" / "step-000004" / "shared-ema").exists()


@pytest.mark.timeout(900)
def test_a_language_model_judges(tmp_path, monkeypatch):
    """The world's own judge is made, examined, and asked in the game; what it says is mostly what the rule would."""
    without_exact(monkeypatch)
    run = train(tmp_path, "--run.steps", 3, "--run.validate_every", 0, config=TINY.with_name("tiny-judge.yaml"))
    played, summary = rows(run), json.loads((run / "summary.json").read_text())
    examined = {name: summary[f"judge_agreement_{name}_before"] for name in ("exact", "order", "faithful")}
    assert {name: played[0][f"eval/judge_agreement_{name}"] for name in examined} == examined
    assert examined["exact"] > 0.8
    assert examined["order"] > 0.75
    assert examined["faithful"] > 0.75
    assert summary["judge_agreement_no_verdict_before"] < 0.02
    for row in played[:3]:
        # what is played is easier than the examination: seldom gibberish
        assert row["play/judge_agreement_order"] > 0.9
        assert row["play/judge_agreement_no_verdict"] < 0.02
        # it stops behind its verdict's closing tag: 6 tokens for a pair, 3 for faithfulness
        assert 3 <= row["play/judge_tokens"] <= 6
        assert row["learn/attacker/grad_norm"] > 0
        assert row["learn/defender/grad_norm"] > 0


def test_no_reasoning(tmp_path, monkeypatch):
    without_exact(monkeypatch)
    run = train(tmp_path, "--run.steps", 2, "--run.validate_every", 0, "--game.reasoning", "false")
    first = rows(run)[0]
    assert first["harmful/attacker/outcome/ok"] > 0.5
    assert first["harmful/attacker/tokens"] < 25


def test_the_same_seed_gives_the_same_metrics(tmp_path, monkeypatch):
    without_exact(monkeypatch)

    def metrics(folder):
        run = train(folder, "--run.steps", 6)
        timed = names.TIMED
        own = ("time", "attempt")
        return [{k: v for k, v in row.items() if k not in own and not k.startswith(timed)} for row in rows(run)]

    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
