"""Checkpoints: exact, never half visible, refused on a changed architecture."""

import errno
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from players import assert_same, model_of, player_of, tensors_of, tokenizer, train
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from tree_samples import tree

from advgame.errors import InputError
from advgame.game.rewards import TreeRewards
from advgame.learn import stored
from advgame.run import player_files as subject
from advgame.run.checkpoint import load_into, save_checkpoint
from advgame.run.checkpoint_files import (
    CheckpointError,
    _state_checksum,
    checkpoint_problem,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_state,
)
from advgame.run.optimizer_state import unpack_optimizer
from advgame.run.train_state import PlayerState, TrainState


def save(folder, player, step=50, keep=3, name="defender", **extra):
    return save_checkpoint(folder, TrainState(step, {name: player}, extra), keep)


@pytest.mark.parametrize("family", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_round_trip_into_fresh_players_is_bit_equal(folder, family, tied, fused):
    saved = player_of(model=model_of(family, tied), fused=fused)
    path = save(folder, saved, reference="rollout", count=2)
    fresh = player_of(model=model_of(family, tied, seed=9), steps=0, fused=fused)
    pointers = [tensor.data_ptr() for tensor in (*fresh.model.parameters(), *fresh.shadow.values())]
    loaded = load_into(path, {"defender": fresh})
    assert (loaded.step, loaded.updates, loaded.extra) == (50, {"defender": 3}, {"reference": "rollout", "count": 2})
    assert_same(tensors_of(fresh), tensors_of(saved))
    assert pointers == [t.data_ptr() for t in (*fresh.model.parameters(), *fresh.shadow.values())], "in place"
    for player in (saved, fresh):
        train(player, seed=2)
    assert_same(tensors_of(fresh), tensors_of(saved))  # the next update agrees to the bit


@pytest.mark.parametrize("family", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_folders_are_ordinary_hugging_face_models(folder, family, tied):
    saved = player_of(model=model_of(family, tied))
    path = save(folder, saved)
    live = AutoModelForCausalLM.from_pretrained(path / "defender")
    ema = AutoModelForCausalLM.from_pretrained(path / "defender-ema")
    assert live.dtype == torch.float32
    assert_same(dict(live.state_dict()), dict(saved.model.state_dict()))
    assert_same(dict(ema.named_parameters()), dict(saved.shadow))
    assert (ema.lm_head.weight is ema.model.embed_tokens.weight) == tied
    again = AutoTokenizer.from_pretrained(path / "defender-ema")
    assert again.chat_template == saved.tokenizer.chat_template
    assert not [p for p in path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_filling_an_optimizer_that_has_state_is_in_place_and_restores_options(folder):
    saved = player_of(amsgrad=True)
    saved.optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    path = save(folder, saved)
    other = player_of(seed=4, steps=1, amsgrad=True)
    moments = [id(state["exp_avg"]) for state in other.optimizer.state.values()]
    load_into(path, {"defender": other})
    assert_same(tensors_of(other), tensors_of(saved))
    assert moments == [id(state["exp_avg"]) for state in other.optimizer.state.values()]
    assert other.optimizer.param_groups[0]["lr"] == 0.1 + 0.2
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_before_the_first_update_and_without_ema_or_optimizer(folder):
    untouched = player_of(steps=0)
    path = save(folder, untouched, step=0)
    stepped = player_of(seed=5, steps=2)
    load_into(path, {"defender": stepped})
    assert_same(tensors_of(stepped), tensors_of(untouched))

    frozen = replace(player_of(ema=False), optimizer=None)
    path = save(folder, frozen, step=1)
    assert sorted(p.name for p in path.iterdir()) == ["defender", "state.json"]
    other = replace(player_of(seed=5, ema=False), optimizer=None)
    load_into(path, {"defender": other})
    assert_same(tensors_of(other), tensors_of(frozen))


def test_tensor_learning_rate_and_views_of_one_buffer(folder):
    model = model_of()
    named = dict(model.named_parameters())
    flat = torch.randn(sum(p.numel() for p in named.values()))
    parts = flat.split([p.numel() for p in named.values()])
    shadow = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
    saved = replace(player_of(model=model, tensor_lr=True, capturable=False, foreach=False), shadow=shadow)
    path = save(folder, saved)
    other = player_of(seed=3, tensor_lr=True, foreach=False)
    other.optimizer.param_groups[0]["lr"].fill_(5.0)
    load_into(path, {"defender": other})
    assert_same(tensors_of(other), tensors_of(saved))
    assert float(other.optimizer.param_groups[0]["lr"]) == float(torch.tensor(1e-2))


def test_two_players_and_two_parameter_groups(folder):
    def split(seed):
        model = model_of(seed=seed)
        decay, rest = [], []
        for p in model.parameters():
            (decay if p.ndim > 1 else rest).append(p)
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        player = PlayerState(model, tokenizer(), {}, torch.optim.AdamW(groups, lr=1e-2), 1)
        train(player)
        return player

    saved = {"attacker": split(1), "defender": split(2)}
    path = save_checkpoint(folder, TrainState(7, saved, {}), 1)
    fresh = {"attacker": split(3), "defender": split(4)}
    load_into(path, fresh)
    for name, player in saved.items():
        assert_same(tensors_of(fresh[name]), tensors_of(player))


def other_shape(**changes):
    return lambda: {"defender": player_of(model=model_of(**changes))}


@pytest.mark.parametrize(
    ("players", "problem"),
    [
        (other_shape(family=1), "architecture is Qwen2ForCausalLM in the checkpoint, LlamaForCausalLM in this"),
        (other_shape(hidden_size=32), "hidden_size is 16 in the checkpoint, 32 in this run"),
        (other_shape(num_hidden_layers=3), "num_hidden_layers is 2"),
        (other_shape(tied=False), "tie_word_embeddings is True"),
        (other_shape(head_dim=4), r"q_proj.* is float32\[16, 16\] in the checkpoint, float32\[8, 16\]"),
        (
            lambda: {"shared": player_of()},
            r"holds players \['defender'\], this run has \['shared'\]; set .*self_play: false",
        ),
        (
            lambda: {"attacker": player_of(), "defender": player_of()},
            r"holds players \['defender'\].*resume with the saved attacker.frozen and game.skip_attacker",
        ),
        (lambda: {"defender": player_of(ema=False)}, r"EMA of .* is float32.* absent in this run"),
        (lambda: {"defender": replace(player_of(), optimizer=None)}, "checkpoint has an optimizer, this run has none"),
        (lambda: {"defender": player_of(model=model_of().bfloat16())}, "is float32.* bfloat16"),
    ],
)
def test_what_differs_is_named_and_nothing_is_touched(folder, players, problem):
    path = save(folder, player_of(model=model_of(head_dim=8)))
    changed = players()
    before = {name: tensors_of(player) for name, player in changed.items()}
    with pytest.raises(InputError, match=problem) as caught:
        load_into(path, changed)
    assert "\n" not in str(caught.value)
    for name, player in changed.items():
        assert_same(tensors_of(player), before[name])


def test_other_optimizers_are_refused(folder):
    path = save(folder, player_of())
    model = model_of()
    sgd = replace(player_of(), model=model, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(InputError, match="optimizer is AdamW in the checkpoint, SGD"):
        load_into(path, {"defender": sgd})
    some = replace(player_of(), model=model, optimizer=torch.optim.AdamW(list(model.parameters())[1:]))
    with pytest.raises(InputError, match="or another order"):
        load_into(path, {"defender": some})


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_the_first_format_loads_and_a_later_one_is_refused(folder):
    """In which every file stood alone, as it still does where one process holds a player."""
    saved = player_of()
    path = save(folder, saved)
    file = path / "state.json"
    for number in (1, 3):
        state = read_state(path) | {"format": number}
        file.write_text(json.dumps(state | {"checksum": _state_checksum(state)}))
        fresh = player_of(seed=8, steps=0)
        if number == 1:
            load_into(path, {"defender": fresh})
            assert_same(tensors_of(fresh), tensors_of(saved))
        else:
            with pytest.raises(InputError, match="has checkpoint format 3; this version reads 2 and older"):
                load_into(path, {"defender": fresh})


def test_the_average_that_sampled_comes_from_its_file_or_from_the_saved_average(folder):
    """As `run.ahead` was and is, and whether anything had been played ahead."""

    def ahead(seed, *, keeps):
        made = player_of(seed=seed)
        return replace(made, previous={n: torch.randn_like(t) for n, t in made.shadow.items()} if keeps else {},
                       recomputes=True)  # fmt: skip

    trees = [(tree(), TreeRewards((), ()))]
    for step, (kept, keeps, played) in enumerate(product((True, False), repeat=3), start=1):
        saved, fresh = ahead(1, keeps=kept), ahead(2, keeps=keeps)
        path = save_checkpoint(folder, TrainState(step, {"defender": saved}, {}, trees if played else []), 1)
        load_into(path, {"defender": fresh})
        if not keeps and not (kept and played):
            assert fresh.previous == {}
        else:
            assert_same(fresh.previous, saved.previous if kept and played else saved.shadow)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda p: damage_byte(p / "defender" / "model.safetensors"), "defender/model.safetensors does not match"),
        (lambda p: damage_byte(p / "optimizer-defender.safetensors"), "optimizer-defender.safetensors"),
        (lambda p: (p / "defender-ema" / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "state.json").write_text("{"), "state.json: missing or unreadable"),
        (lambda p: edit(p / "state.json", '"updates": 3', '"updates": 4'), "does not match its checksum"),
    ],
)
def test_damaged_newest_falls_back(folder, damage, word):
    player = player_of()
    older = save(folder, player, step=50)
    newer = save(folder, player, step=100)
    assert latest_checkpoint(folder.checkpoints).path == newer
    damage(newer)
    warnings = []
    found = latest_checkpoint(folder.checkpoints, warnings.append)
    assert found.path == older
    assert len(found.skipped) == len(warnings) == 1
    assert word in warnings[0]
    with pytest.raises(InputError, match=word):
        load_into(newer, {"defender": player})


def test_no_checkpoint(folder, capsys):
    assert latest_checkpoint(folder.checkpoints).path is None
    (folder.checkpoints / "step-000001").mkdir()
    found = latest_checkpoint(folder.checkpoints)
    assert found.path is None
    assert len(found.skipped) == 1
    assert "step-000001" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["optimizer", "model", "tokenizer", "rename"])
def test_full_disk_leaves_the_last_checkpoint(folder, monkeypatch, where):
    player = player_of()
    first = save(folder, player, step=50)

    def full(*args, **kwargs):
        target = args[0] if where == "tokenizer" else None
        if target is not None:
            Path(target).joinpath("half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "optimizer":
        monkeypatch.setattr(subject, "save_file", full)
    elif where == "model":
        monkeypatch.setattr(player.model, "save_pretrained", full, raising=False)
    elif where == "tokenizer":
        monkeypatch.setattr(player.tokenizer, "save_pretrained", full, raising=False)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are intact") as caught:
        save(folder, player, step=100, keep=1)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000050"]
    assert latest_checkpoint(folder.checkpoints).path == first


def test_rust_writers_report_a_full_disk_too(folder, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(subject, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(folder, player_of())


def test_interrupted_and_failing_writes_leave_nothing(folder, monkeypatch):
    for error in (KeyboardInterrupt, RuntimeError):

        def stop(*_, error=error):
            raise error

        monkeypatch.setattr(subject, "save_file", stop)
        with pytest.raises(error):
            save(folder, player_of())
        assert list(folder.checkpoints.iterdir()) == []


def test_retention_keeps_the_newest_and_sweeps_what_kills_left(folder):
    player = player_of()
    (folder.checkpoints / ".tmp-step-000010-99").mkdir()
    for step in (50, 100, 150):
        save(folder, player, step=step, keep=2)
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == ["step-000100", "step-000150"]
    with pytest.raises(InputError, match="at least 1"):
        save(folder, player, keep=0)


def test_a_kill_in_the_middle_of_deleting_leaves_no_half_checkpoint(folder, monkeypatch):
    player = player_of()
    for step in (50, 100):
        save(folder, player, step=step, keep=2)
    real = shutil.rmtree

    def killed(path, **kwargs):
        if Path(path).exists():
            next(Path(path).glob("*.safetensors")).unlink()
            raise SystemExit
        real(path, **kwargs)

    monkeypatch.setattr("advgame.run.checkpoint_files.shutil.rmtree", killed)
    with pytest.raises(SystemExit):
        save(folder, player, step=150, keep=1)
    monkeypatch.undo()
    assert all(checkpoint_problem(path) is None for _, path in list_checkpoints(folder.checkpoints))
    prune_checkpoints(folder.checkpoints, 150, keep=1)
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000150"]


def test_resuming_earlier_abandons_the_later_branch(folder):
    player = player_of()
    for step in (50, 100):
        save(folder, player, step=step)
    save(folder, player, step=75)
    assert [step for step, _ in list_checkpoints(folder.checkpoints)] == [50, 75]
    damage_byte(folder.checkpoints / "step-000075" / "state.json")
    save(folder, player, step=75, note="again")
    assert latest_checkpoint(folder.checkpoints).path == folder.checkpoints / "step-000075"


def test_state_says_what_it_must(folder):
    path = save(folder, player_of())
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 50
    assert len(state["config_sha256"]) == 64
    order = state["players"]["defender"]["optimizer"]["groups"][0]["params"]
    assert order == [name for name, _ in model_of().named_parameters()]
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(state["checksums"]) == files - {"state.json"}
    assert "step/lm_head.weight" not in load_file(path / "optimizer-defender.safetensors")


def test_sharded_folder_and_unfamiliar_tensor_names_load(folder, monkeypatch):
    """Families whose files have other names than their modules go through from_pretrained."""
    saved = player_of(ema=False)
    path = save(folder, saved)
    shutil.rmtree(path / "defender")
    saved.model.save_pretrained(path / "defender", max_shard_size="5KB")
    assert len(list((path / "defender").glob("*.safetensors"))) > 1
    fresh = player_of(seed=8, ema=False)
    load_into(path, {"defender": fresh}, verify=False)
    assert_same(tensors_of(fresh), tensors_of(saved))

    class Renamed:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def keys(self):
            return ["some.other.name"]

        def get_tensor(self, name):
            return torch.zeros(1)

    real = stored.safe_open
    monkeypatch.setattr(
        stored, "safe_open", lambda path, **how: (real if path.name.startswith("optimizer") else Renamed)(path, **how)
    )
    other = player_of(seed=9, ema=False)
    load_into(path, {"defender": other}, verify=False)
    assert_same(tensors_of(other), tensors_of(saved))


def test_an_ema_of_unknown_tensors_is_refused(folder):
    player = replace(player_of(), shadow={"nothing": torch.zeros(1)})
    with pytest.raises(InputError, match="'nothing'"):
        save(folder, player)


@pytest.mark.parametrize("capturable", [False, True])
def test_step_counts_live_where_torch_puts_them(capturable):
    """On the parameter's device if capturable (or fused), else on the CPU; `meta` stands in for a GPU."""
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter], capturable=capturable)
    described = {"groups": [{"params": ["w"], "options": {}}], "scalars": {}}
    tensors = {"step/w": torch.tensor(3.0), "exp_avg/w": torch.ones(2)}
    unpack_optimizer(optimizer, {"w": parameter}, tensors, described)
    state = optimizer.state[parameter]
    assert state["step"].device.type == ("meta" if capturable else "cpu")
    assert state["exp_avg"].device.type == "meta"
