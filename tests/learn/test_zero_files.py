"""Checkpoints that ranks write of what each holds: bit for bit what others read, on any number of ranks; whoever fails
or dies meanwhile leaves the checkpoints before intact."""

import json
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file
from test_deepspeed import ROOT, needs_deepspeed, torchrun
from transformers import AutoConfig, AutoModelForCausalLM

from advgame.learn.load import load_model, outline
from advgame.learn.part_files import await_parts, divide, index, numbered, write_part
from advgame.learn.stored import copy_model, files_of, stored
from advgame.learn.zero_files import as_stored
from advgame.run.checkpoint_files import checkpoint_problem, latest_checkpoint, prune_checkpoints

SCRIPT = ROOT / "tests" / "learn" / "zero_saves.py"
STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("player"))


@pytest.fixture(scope="module")
def saves(player, tmp_path_factory):
    """The folder in which two ranks saved, and what rank 0 found."""
    folder = tmp_path_factory.mktemp("saves")
    torchrun(2, SCRIPT, player, folder, "save", 0)
    return folder, json.loads((folder / "save.json").read_text())


@needs_deepspeed
@pytest.mark.slow
def test_what_two_ranks_save_is_read_by_two_and_by_one_process_to_the_bit(saves):
    _, found = saves
    for stage in STAGES:
        for what in ("folders", "plain", "read", "next", "of plain"):
            assert found[f"{stage} {what}"] == [], (stage, what)
        assert found[f"{stage} problem"] is None
        assert found[f"{stage} steps"] == 2.0
    assert found["fresh"] == []


@needs_deepspeed
@pytest.mark.slow
def test_every_rank_writes_its_share_and_rank_0_never_holds_more_than_a_parameter_of_others(saves):
    _, found = saves
    for stage in STAGES:
        assert found[f"{stage} on rank 0"] == ["meta"]
        assert found[f"{stage} largest"] <= found["largest"] < found["elements"] / 8
        files = found[f"{stage} files"]
        stems = ("player/model", "player-ema/model", "optimizer-player", "previous-player")
        assert sorted(files) == sorted(f"{stem}-0000{i}-of-00002.safetensors" for stem in stems for i in (1, 2))
        for stem in stems:
            sizes = [files[f"{stem}-0000{i}-of-00002.safetensors"] for i in (1, 2)]
            assert max(sizes) < 0.6 * sum(sizes)


@needs_deepspeed
@pytest.mark.slow
def test_ranks_that_fail_are_named_and_cost_one_checkpoint(saves):
    _, found = saves
    where = r"failing/step-000002: could not be written (trainer rank 1 on "
    for kind, why in (("full", ": No space left on device); "), ("blind", " does not see ")):
        assert found[kind].startswith("CheckpointError: ")
        assert where in found[kind]
        assert why in found[kind]
        assert "earlier checkpoints are intact" in found[kind]
        assert "\n" not in found[kind]
    assert "put run.root on a file system that all ranks share, at the same path" in found["blind"]
    assert found["blind start"].startswith("InputError: trainer rank 1 on ")
    assert " does not see " in found["blind start"]
    assert "step-000001, player player: cannot be read (trainer rank 1 on " in found["blind read"]
    assert found["left"] == ["step-000001"]
    assert found["kept"] is None
    assert "cannot be read (trainer rank 0 on " in found["missing"]
    assert "optimizer-player-00001-of-00002.safetensors is missing)" in found["missing"]
    assert found["last"] is None


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("number", "attacker_ranks"), [(1, 0), (3, 1)])
def test_other_numbers_of_ranks_go_on_from_it(saves, player, number, attacker_ranks):
    """One; and two of three, where rank 0 holds nothing."""
    folder, _ = saves
    torchrun(number, SCRIPT, player, folder, "read", attacker_ranks)
    found = json.loads((folder / "read.json").read_text())
    for stage in STAGES:
        assert found[f"{stage} unequal"] == []
        assert found[f"{stage} again"] == []
        assert ("player/model.safetensors" in found[f"{stage} files"]) == (number == 1)


@needs_deepspeed
@pytest.mark.slow
def test_a_rank_killed_before_it_writes_leaves_nothing_visible(player, tmp_path):
    with pytest.raises(AssertionError):
        torchrun(2, SCRIPT, player, tmp_path, "kill", 0)
    checkpoints = tmp_path / "checkpoints"
    whole = checkpoints / "step-000001"
    assert latest_checkpoint(checkpoints).path == whole
    assert [p.name for p in checkpoints.iterdir() if not p.name.startswith(".tmp-step-000002-")] == ["step-000001"]
    prune_checkpoints(checkpoints, 1, 3)
    assert [*checkpoints.iterdir()] == [whole]
    assert checkpoint_problem(whole) is None


def test_an_outline_is_the_model_without_values(player):
    made, whole = outline(player, "x"), load_model(player, "x")
    assert {p.device.type for p in made.parameters()} == {"meta"}
    shapes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (made, whole)]
    assert shapes[0] == shapes[1]
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_families_that_are_stored_otherwise_are_divided_so_that_they_load(tmp_path, writers):
    """Fused experts are stored one by one; what each rank makes of its layers together is what one process saves."""
    sizes = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes))
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    named = dict(whole.named_parameters())
    assert any("experts.gate_up_proj" in name for name in named)
    folder, files = tmp_path / "parts" / "p", {}
    folder.mkdir(parents=True)
    parts = [part for part in divide({n: p.shape for n, p in named.items()}, writers) if part]
    for i, part in enumerate(parts):
        own = as_stored(whole, {name: named[name].detach() for name in part})
        write_part(tmp_path / "parts", f"note-{i}", {numbered("p/model", i, len(parts)): lambda own=own: own}, "")
        files |= await_parts(tmp_path / "parts", {f"note-{i}": i}, lambda: None)
    made = dict(stored(files_of(folder, "model")))
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())

    # what ranks read of it, and transformers
    whole.config.save_pretrained(folder)
    if len(parts) > 1:
        weights = index({Path(name).name: one for name, one in files.items()}, whole.num_parameters())
        (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    spans = {name: (p.numel() // 3, p.numel() - 2 * (p.numel() // 3)) for name, p in named.items()}
    pieces = {name: torch.empty(length) for name, (_, length) in spans.items()}
    copy_model(folder, whole, pieces, spans)
    again = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, (start, length) in spans.items():
        assert torch.equal(pieces[name], named[name].detach().view(-1)[start : start + length])
        assert torch.equal(again[name], named[name])
