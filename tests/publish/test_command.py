"""`advgame publish --plan`: prints, saves and compares real plans; bad input is one line."""

import engines
import models
import pytest
from command_line import fails

from advgame import cli


def test_bad_input(capsys, tmp_path):
    pytest.importorskip("vllm")
    assert "--plan: " in (err := fails(capsys, "publish", "--plan", tmp_path))
    assert "no config.json" in err
    folder = models.folder(tmp_path / "m")
    assert "heads of size 8" in fails(capsys, "publish", "--plan", folder)
    assert "--diff: " in fails(capsys, "publish", "--plan", folder, "--diff", folder / "config.json")
    assert "unexpected argument" in fails(capsys, "publish", "--plan", folder, "--wide", "3")


@pytest.mark.slow
def test_a_real_plan_is_printed_saved_and_compared(capfd, tmp_path):
    pytest.importorskip("vllm")
    folder, saved = engines.folder(tmp_path / "m"), tmp_path / "plan.json"
    assert cli.main(["publish", "--plan", str(folder), "--save", str(saved)]) == 0
    out = capfd.readouterr().out
    assert "m, rank 0 of 1: 26 sources, 26 copies, 1 fills" in out
    assert "storage model.embed_tokens.weight bfloat16 8192 (also lm_head.weight)" in out
    assert (
        "copy model.layers.0.self_attn.k_proj.weight -> model.layers.0.self_attn.qkv_proj.weight [16384: 64x128]" in out
    )
    assert cli.main(["publish", "--plan", str(folder), "--diff", str(saved), "--tensor-parallel", "2"]) == 1
    assert "1 ranks, now 2" in capfd.readouterr().out
    assert cli.main(["publish", "--plan", str(folder), "--diff", str(saved)]) == 0
    assert "equal: plan " in capfd.readouterr().out
