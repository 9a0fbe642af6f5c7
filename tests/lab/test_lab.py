"""The lab: jobs that resume, rows with standard errors, directions that need evidence, and one real small lab."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from advgame import cli
from advgame.config import load_config
from advgame.errors import InputError
from advgame.lab.arguments import add_lab_arguments
from advgame.lab.command import markdown, plan_jobs
from advgame.lab.figures import draw_figures
from advgame.lab.jobs import Job, last_words, run_jobs
from advgame.lab.results import gap_series, judge_claims, mean_of, measured, rows_of, rows_of_json
from advgame.lab.variants import BASE, CLAIMS, SWEEPS, VARIANTS, by_name
from advgame.run import names

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_lab_arguments(parser)
    return parser.parse_args(list(words))


def finished(root: Path, variant: str, seed: int, harm: float, curve=(0.8, 0.4, 0.2, 0.1), **more) -> Job:
    """A run folder as a finished run leaves it."""
    job = Job(by_name(variant), "easy", seed, len(curve), 1, TINY, root)
    job.folder.mkdir(parents=True)
    rows = [{"step": step + 1, "eval/exploitability": value} for step, value in enumerate(curve)]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"exploitability_after": harm, "asr_after": harm / 2, "seconds": 10.0, **more}
    (job.folder / "summary.json").write_text(json.dumps(summary))
    return job


def test_every_variant_is_a_valid_config_and_names_are_unique():
    known = [variant.name for variant in (*VARIANTS, *SWEEPS)]
    assert len(set(known)) == len(known)
    for variant in (*VARIANTS, *SWEEPS):
        load_config(TINY, list(variant.words))
    for claim in CLAIMS:
        assert claim.better in known
        assert claim.worse in known


def test_quick_and_full_and_only():
    quick = plan_jobs(arguments())
    assert len(quick) == len(VARIANTS)
    assert {job.steps for job in quick} == {80}
    full = plan_jobs(arguments("--full"))
    assert len(full) == 2 * 3 * len(VARIANTS)
    assert {job.world for job in full} == {"easy", "hard"}
    only = plan_jobs(arguments("--only", "lr-3e-4", "--worlds", "hard", "--seeds", "2"))
    assert [(job.variant.name, job.world, job.seed) for job in only] == [("lr-3e-4", "hard", 0), ("lr-3e-4", "hard", 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing"], "--only 'nothing': known: dpo-md"),
        (["--worlds", "easy,moon"], "--worlds 'moon': known: easy, hard"),
        (["--seeds", "0"], "give 1 or more"),
        (["--jobs", "0"], "give 1 or more"),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(InputError, match=message):
        plan_jobs(arguments(*words))


def test_rows_hold_means_and_standard_errors(tmp_path):
    jobs = [finished(tmp_path, BASE, seed, harm) for seed, harm in enumerate((0.1, 0.2, 0.3))]
    (row,) = rows_of(jobs)
    harm = row.mean("harm")
    assert harm is not None
    assert (harm.mean, harm.n) == (pytest.approx(0.2), 3)
    assert harm.error == pytest.approx(0.1 / math.sqrt(3))
    assert str(harm) == "0.200 ± 0.058"
    gap = row.mean("gap")
    assert gap is not None
    assert gap.mean == pytest.approx(0.1)


def test_swing_is_of_the_second_half(tmp_path):
    job = finished(tmp_path, BASE, 0, 0.1, curve=(0.9, 0.0, 0.5, 0.2, 0.4, 0.1))
    # the late half is .2, .4, .1: changes of .2 and -.3
    assert measured(job)["swing"] == pytest.approx(math.sqrt((0.04 + 0.09) / 2))


def test_a_direction_needs_two_seeds_and_two_errors(tmp_path):
    def verdict(better, worse):
        root = tmp_path / f"{better}{worse}"
        jobs = [finished(root, BASE, s, h) for s, h in enumerate(better)]
        jobs += [finished(root, "pointwise", s, h) for s, h in enumerate(worse)]
        return judge_claims(rows_of(jobs), [CLAIMS[0]])[0].verdict

    assert verdict((0.1, 0.11, 0.12), (0.5, 0.52, 0.55)) == "appears"
    assert verdict((0.5, 0.52, 0.55), (0.1, 0.11, 0.12)) == "the opposite appears"
    assert verdict((0.1, 0.5), (0.2, 0.6)) == "not established"
    assert verdict((0.1,), (0.9,)) == "one seed: nothing can be said"


def test_a_direction_without_runs_is_not_measured(tmp_path):
    found = judge_claims(rows_of([finished(tmp_path, BASE, 0, 0.1)]))
    assert {f.verdict for f in found} == {"not measured"}


def test_markdown_names_commit_and_seeds(tmp_path):
    rows = rows_of([finished(tmp_path, BASE, seed, 0.1) for seed in range(2)])
    text = markdown(rows, judge_claims(rows), ["abc123"], 300)
    assert "commit abc123" in text
    assert "**easy world**, 2 seeds" in text
    assert "| DPO-MD, the default | 0.100 ± 0.000 |" in text


def test_the_commit_of_a_run_is_its_starts(tmp_path):
    job = finished(tmp_path, BASE, 0, 0.1)
    assert job.commit == "unknown"
    start = {"git_commit": "0123456789abcdef", "git_dirty": True}
    (job.folder / "environment.json").write_text(json.dumps({"starts": [start, start | {"git_dirty": False}]}))
    assert job.commit == "0123456789ab+"


def test_the_gap_is_the_exact_value_less_what_play_showed(tmp_path):
    job = finished(tmp_path, BASE, 0, 0.1)
    rows = [{"step": step, names.ASR: 0.2} for step in range(20)]
    rows[0][names.EXPLOITABILITY] = 0.8
    rows[12] |= {names.EXPLOITABILITY: 0.5, names.ASR: 0.31}
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gap_series(job) == [(0, pytest.approx(0.6)), (12, pytest.approx(0.5 - 0.21))]
    assert {path.name for path in draw_figures([job], rows_of([job]), tmp_path / "f")} >= {
        "easy-gap.svg",
        "easy-asr.svg",
    }


def test_mean_of_one_and_none():
    assert mean_of([]) is None
    one = mean_of([0.5])
    assert one is not None
    assert math.isnan(one.error)
    assert str(one) == "0.500"


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path):
    """The config of one job is broken: its log says why, and a finished one is not played again."""
    broken = replace(finished(tmp_path, "grpo", 0, 0.1), config=tmp_path / "none.yaml", seed=1)
    ready = finished(tmp_path, BASE, 0, 0.1)
    failed = run_jobs([ready, broken], 2, lambda running, failed: None)
    assert failed == [broken]
    assert "no such config file" in last_words(broken)


def test_runs_of_more_steps_are_not_passed_off_as_shorter_ones(tmp_path, capsys):
    job = finished(tmp_path / "runs", BASE, 0, 0.1)
    (job.folder / "config.yaml").write_text("run: {steps: 300}")
    assert cli.main(["lab", "--table-only", "--full", "--out", str(tmp_path)]) == 2
    assert "is of 300 steps, and 200 are asked for; give --steps 300, or another --out" in capsys.readouterr().err


def test_table_of_nothing_is_one_line(tmp_path, capsys):
    assert cli.main(["lab", "--table-only", "--out", str(tmp_path)]) == 2
    assert "no finished run yet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lab_for_real_interrupted_and_continued(tmp_path):
    """Two variants, two processes; Ctrl-C in the middle, then the same command ends it and writes everything."""
    words = ["lab", "--only", BASE, "fixed-attacker", "--steps", "12", "--out", str(tmp_path), "--jobs", "2"]
    command = [sys.executable, "-m", "advgame.cli", *words]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    runs = tmp_path / "runs" / "easy"
    end = time.monotonic() + 400
    while time.monotonic() < end and first.poll() is None:
        if any(len(p.read_bytes().splitlines()) >= 2 for p in runs.glob("*/seed0/metrics.jsonl")):
            first.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    first.communicate(timeout=120)
    assert first.returncode == 130
    assert not (tmp_path / "table.md").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert second.returncode == 0, second.stdout + second.stderr
    tree = json.loads((tmp_path / "results.json").read_text())
    assert [row["variant"] for row in tree["rows"]] == [BASE, "fixed-attacker"]
    for name in (BASE, "fixed-attacker"):
        steps = [
            json.loads(line)["step"] for line in (runs / name / "seed0" / "metrics.jsonl").read_text().splitlines()
        ]
        assert [s for s in dict.fromkeys(steps) if s][-1] == 12
    assert (tmp_path / "figures" / "easy-frontier.svg").is_file()
    table = (tmp_path / "table.md").read_text()
    assert "one seed: nothing can be said" in table
    rows = rows_of_json(tree)
    assert markdown(rows, judge_claims(rows), tree["commits"], tree["steps"]) == table
