"""`advgame resources`: sums to the step at which a run was first good enough, on run folders with made-up numbers."""

import json

import pytest
from run_samples import make_run

from advgame import cli
from advgame.errors import InputError
from advgame.report.resources import condition_of, costs, groups_of, used
from advgame.run import names


def test_sums_end_where_all_conditions_first_hold(tmp_path):
    run = make_run(tmp_path / "dpo-md", "seed0")
    # exploitability is .8, .65, .5, .35 and over-refusal .9, .75, .6, .45 at steps 0, 3, 6, 9
    conditions = [condition_of("exploitability <= 0.65"), condition_of("worst_over_refusal<=0.61")]
    found = used(run, conditions)
    assert found.step == 6
    assert found.values["seconds"] == pytest.approx(6 * 2.0)
    assert found.values["processor seconds"] == pytest.approx(6.0)
    assert "kWh" not in found.values
    late = used(run, [condition_of("exploitability<=0.1")])
    assert late.step is None
    assert late.values["seconds"] == pytest.approx(12 * 2.0)
    full = used(run, [condition_of(f"validation/plain/{names.COMPLIANCE}>=0.75")])
    assert full.step == 3


def test_evaluation_is_left_out_and_energy_is_converted():
    row = {
        names.STEP_SECONDS: 5.0, names.stage_seconds("validate"): 3.0, "seconds/engine/attacker": 36.0,
        "seconds/engine/judge": 36.0, "energy/joules": 7.2e6, "energy/co2e_g": 800.0,
        "energy/process_cpu_s": 4.5,
    }  # fmt: skip
    expected = {"seconds": 2.0, "hours of engines": 0.02, "processor seconds": 4.5, "kWh": 2.0, "CO2e kg": 0.8}
    assert costs(row) == expected
    row |= {"energy/evaluation_cpu_s": 2.5, "energy/evaluation_j": 3.6e6}
    assert costs(row) == expected | {"processor seconds": 2.0, "kWh": 1.0, "CO2e kg": 0.4}
    assert costs({names.EXPLOITABILITY: 0.1}) == {}


def test_seeds_of_one_variant_are_a_group(tmp_path):
    runs = [tmp_path / name for name in ("dpo-md/seed0", "dpo-md/seed1", "turns/seed0", "mine", "tiny-3", "tiny-4")]
    conditions = [condition_of("exploitability<=0.65")]
    for run in runs:
        make_run(run.parent, run.name)
    groups = groups_of([used(run, conditions) for run in runs])
    assert {name: len(group) for name, group in groups.items()} == {"dpo-md": 2, "turns": 1, "mine": 1, "tiny": 2}


def test_the_command(tmp_path, capsys):
    runs = [make_run(tmp_path / way, f"seed{seed}") for way in ("joint", "turns") for seed in range(2)]
    out = tmp_path / "used.json"
    words = ["resources", *map(str, runs), "--until", "exploitability<=0.5", "--out", str(out)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "joint" in printed
    assert "12 (12 to 12)" in printed
    assert [row["step"] for row in json.loads(out.read_text())] == [6, 6, 6, 6]
    assert cli.main(["resources", str(runs[0])]) == 1
    assert "not good enough by its end" in " ".join(capsys.readouterr().out.split())  # wrapped where the path ends


@pytest.mark.parametrize("text", ["exploitability", "exploitability<0.1", "exploitability<=x", "a<=nan", "<=1"])
def test_a_condition_that_is_none(text):
    with pytest.raises(InputError, match="write a metric"):
        condition_of(text)


def test_a_metric_that_was_never_measured_is_named(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(InputError, match=r"eval/asr.*never measured it; known: eval/exploitability"):
        used(run, [condition_of("asr<=0.1")])
