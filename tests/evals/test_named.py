"""One reading of model names for every command: folders, runs, players before training, servers."""

import json

import models
import pytest

from advgame.errors import InputError
from advgame.evals.models import chat_format
from advgame.evals.named import parse_model, short_names
from advgame.rollout.chat import load_tokenizer


@pytest.fixture
def run(tmp_path):
    """A run's folder whose players are bare models; its Defender reasons first."""
    player = models.bpe_folder(tmp_path / "player", "qwen2")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    config = {
        "run": {"purpose": "a test"},
        "data": {"train": str(tmp_path / "seeds.jsonl")},
        "attacker": {"model": str(player)},
        "defender": {"model": str(player)},
        "judge": {"kind": "phrases"},
        "game": {"defender_reasoning": True},
    }
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    return tmp_path / "run"


def test_a_player_before_training_is_named_by_role(run, tmp_path):
    defender, attacker = parse_model(f"{run}:initial", "MODEL"), parse_model(f"{run}:initial", "--attacker", "attacker")
    assert (defender.player, attacker.player) == ("defender", "attacker")
    assert defender.model_folder() == attacker.model_folder() == tmp_path / "player"
    assert defender.identity() == parse_model(str(tmp_path / "player"), "MODEL").identity()
    assert len(set(short_names([defender, attacker, attacker]))) == 3
    with pytest.raises(InputError, match=r"no intact checkpoint; write .*run:initial for the untrained player"):
        parse_model(str(run), "MODEL")
    with pytest.raises(InputError, match="has no checkpoint 'step-000009'; there are: initial, none"):
        parse_model(f"{run}:step-000009", "MODEL")


def test_a_defender_that_reasons_is_asked_to_and_nobody_else_is(run):
    for role, reasons in (("target", True), ("attacker", False), ("judge", False)):
        spec = parse_model(f"{run}:initial", "MODEL", role)
        tokenizer = load_tokenizer(spec.model_folder(), "MODEL")
        text = tokenizer.decode(chat_format(spec, tokenizer).prompt_ids("how do i kill"))
        assert "how do i kill" in text
        assert ("<think>" in text) == reasons


def test_settings_of_a_server_follow_its_name():
    spec = parse_model("http://127.0.0.1:1/v1#org/name?concurrency=3&rpm=90", "MODEL")
    assert (spec.name, spec.endpoint.concurrency, spec.endpoint.rpm) == ("org_name", 3, 90.0)
    with pytest.raises(InputError, match="MODEL: rpm: input should be greater than 0; known: api, api_key_env"):
        parse_model("http://127.0.0.1:1/v1#m?rpm=0", "MODEL")


def test_a_models_own_name_may_hold_a_colon(tmp_path):
    folder = models.folder(tmp_path / "a:b")
    assert parse_model(str(folder), "MODEL").folder == folder
