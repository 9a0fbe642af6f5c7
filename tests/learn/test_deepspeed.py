"""The DeepSpeed learner: equal to the plain one on one rank and on two, at every ZeRO stage; runs under torchrun."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from advgame import cli
from advgame.config import build_config
from advgame.errors import InputError
from advgame.learn.micro import packed_tokens, shares
from advgame.learn.zero_config import check_backend, engine_config
from advgame.run import names

ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; make test installs it"
)
LEARNS = {"world": {"level": "easy"}, "data": {"harmful": 4, "benign": 4}}


def torchrun(ranks, *words, timeout=800):
    """(standard output, standard error) of a command of `ranks` processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += map(str, words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """How far the sharded learners are from the plain one, by number of ranks, measured when first asked for."""
    player = models.folder(tmp_path_factory.mktemp("player"))
    found = {}

    def of(ranks, attacker_ranks=0):
        if (ranks, attacker_ranks) not in found:
            out = tmp_path_factory.mktemp("ranks") / "gaps.json"
            torchrun(ranks, ROOT / "tests" / "learn" / "zero_ranks.py", player, out, attacker_ranks)
            found[ranks, attacker_ranks] = json.loads(out.read_text())
        return found[ranks, attacker_ranks]

    return of


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_is_the_plain_learner(gaps, ranks):
    """Weights, moments, averages, what is served, and metrics; uneven pairs, and an update with one pair for two
    ranks."""
    measured = dict(gaps(ranks))
    assert measured.pop("plain")["moved"] > 1e-3
    assert len(measured) == 5 * 5 + 1 + 4
    for case, kinds in measured.items():
        if "bfloat16" in case:
            continue
        assert {"live", "step"} < kinds.keys()
        worst = {kind: gap for kind, gap in kinds.items() if not gap <= 1e-5}
        assert not worst, (case, worst)


@needs_deepspeed
@pytest.mark.slow
def test_a_player_on_ranks_of_its_own_is_the_plain_learner(gaps):
    """The Defender on the second and third of three ranks: rank 0 holds nothing of it; still it publishes, saves."""
    measured = dict(gaps(3, 1))
    assert measured.pop("plain")["moved"] > 1e-3
    assert len(measured) == 5 * 3
    worst = {(case, kind): gap for case, kinds in measured.items() for kind, gap in kinds.items() if not gap <= 1e-5}
    assert not worst


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16_is_near_the_plain_learner(gaps, ranks):
    """Weights that compute are rounded where the plain learner casts in passing: losses agree as bf16 does, steps stay
    within the learning rate."""
    for stage in range(4):
        kinds = gaps(ranks)[f"stage {stage}, bfloat16"]
        assert kinds["metric 0 loss"] < 0.02
        assert kinds["live"] < 2 * len("012") * 1e-3
        assert kinds["step"] == 0


def config(**learn):
    return build_config({**LEARNS, "learn": {"backend": "deepspeed", **learn}}, "test")


def with_file(tmp_path, tree, **learn):
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return config(deepspeed={"config": str(path)}, **learn)


@needs_deepspeed
def test_a_users_file_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
    }  # fmt: skip
    taken = with_file(tmp_path, given)
    check_backend(taken)
    made = engine_config(taken.learn)
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert made["gradient_clipping"] == 1.0
    assert not {"optimizer", "train_batch_size", "bf16", "fp16"} & made.keys()
    narrow = engine_config(with_file(tmp_path, given, dtype="bfloat16").learn)
    assert narrow["bf16"] == {"enabled": True}
    assert narrow["data_types"] == {"grad_accum_dtype": "fp32"}
    assert engine_config(config().learn)["zero_optimization"] == {"stage": 2}


@needs_deepspeed
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5; set it to auto or 1.0 (learn.clip_norm)"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8; set it to auto or 1"),
        ({"train_batch_size": 64}, "train_batch_size is 64; set it to auto or 4"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu is 3; set it to auto or 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true; set it to auto or false (learn.dtype)"),
        ({"fp16": {"enabled": True}}, "fp16: players train in float32 or bfloat16; set fp16.enabled: false"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: learn.lr and learn.lr_final make the schedule"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb'"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, "optimizer.params.lr is 1; set it to auto or 1e-06"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; set 0, 1, 2 or 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "averages follow master weights in memory"),
        ("{", "not readable as JSON"),
        ("[]", "a DeepSpeed config is an object, found list"),
    ],
)
def test_a_users_file_is_refused(tmp_path, monkeypatch, tree, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"ds\.json: ") as error:
        check_backend(with_file(tmp_path, tree))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@needs_deepspeed
def test_other_settings_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(InputError, match=r"stage is 3, but learn\.deepspeed\.stage is 1"):
        check_backend(config(deepspeed={"config": str(path), "stage": 1}))
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        check_backend(config(deepspeed={"config": str(tmp_path / "none.json")}))
    for field, value in (("lora", {}), ("optimizer", "adamw8bit"), ("compile", True)):
        with pytest.raises(InputError, match=f"learn.{field}: "):
            config(**{field: value})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun started 2; set deepspeed"):
        check_backend(build_config(LEARNS, "test"))
    with pytest.raises(InputError, match=r"attacker_ranks: 2 of 2 ranks leave none for the Defender"):
        check_backend(config(deepspeed={"attacker_ranks": 2}))
    with pytest.raises(InputError, match=r"attacker_ranks: only one player learns"):
        build_config(LEARNS | {"attacker": {"frozen": True}, "learn": {"backend": "deepspeed",
                     "deepspeed": {"attacker_ranks": 1}}}, "test")  # fmt: skip


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("advgame.learn.zero_config.find_spec", lambda name: None)
    assert cli.main(["train", str(ROOT / "configs" / "tiny.yaml"), "--learn.backend", "deepspeed"]) == 2
    assert "pip install 'advgame[deepspeed]'" in capsys.readouterr().err


def test_ranks_get_equal_shares():
    from zero_ranks import pairs

    units = [(i, (p.chosen, p.rejected)) for i, p in enumerate(pairs(9))]
    for ranks in (1, 2, 3, 8, 16):
        made = shares(units, ranks, 10_000, share=True)
        assert len(made) == ranks
        assert sorted(i for own in made for i, _ in own) == list(range(9))
        loads = [packed_tokens([s for _, own in part for s in own], True) for part in made]
        # at most one piece more than the mean: what shares a prompt stays together up to a rank's share
        piece = max(math.ceil(sum(loads) / ranks), *(packed_tokens(own, True) for _, own in units))
        assert max(loads) <= sum(loads) / ranks + piece
        assert sum(not part for part in made) == max(0, ranks - 9)


def rows(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = ("time", "attempt", *names.TIMED)
    packed = ("tokens", "tokens_saved", "reference_change")
    return [{k: v for k, v in r.items() if not k.startswith(own) and k.split("/")[-1] not in packed} for r in found]


def assert_equal_runs(run, other, steps):
    ours, theirs = rows(run), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name
    for name in ("attacker", "attacker-ema", "defender", "defender-ema"):
        a, b = (
            AutoModelForCausalLM.from_pretrained(path / "checkpoints" / f"step-{steps:06d}" / name).state_dict()
            for path in (run, other)
        )
        assert all(torch.allclose(a[key], b[key], atol=1e-4, rtol=0) for key in b)


@needs_deepspeed
@pytest.mark.slow
def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path):
    """Starts on two ranks that share both players, goes on in one process without DeepSpeed, and ends on two ranks with
    a player each."""
    short = [
        "train", ROOT / "configs" / "tiny.yaml", "--quiet", "--run.root", tmp_path, "--data.validation_limit", 4,
        "--run.checkpoint_every", 1, "--run.validate_every", 0, "--data.harmful", 6, "--data.benign", 6,
        "--learn.lr_final", 1.0, "--run.tensorboard", "false",
    ]  # fmt: skip
    assert cli.main([*map(str, short), "--run.name", "plain", "--run.steps", "3"]) == 0
    sharded = ["--learn.backend", "deepspeed", "--learn.micro_tokens", 256, "--learn.deepspeed.stage", 3]
    out, err = torchrun(2, "-m", "advgame", *short, *sharded, "--run.name", "cut", "--run.steps", 1)
    cut = tmp_path / "cut"
    assert out == f"{cut}\n"
    assert "Traceback" not in err
    assert rows(tmp_path / "plain")[1]["learn/attacker/pairs"] > 0
    assert cli.main(["resume", str(cut), "--quiet", "--run.steps", "2", "--learn.backend", "plain"]) == 0
    apart = ["--learn.backend", "deepspeed", "--learn.deepspeed.stage", 2, "--learn.deepspeed.attacker_ranks", 1]
    out, _ = torchrun(2, "-m", "advgame", "resume", cut, "--quiet", "--run.steps", 3, *apart)
    assert out == f"{cut}\n"
    assert_equal_runs(cut, tmp_path / "plain", 3)
