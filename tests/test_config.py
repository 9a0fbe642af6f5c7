"""Settings: files, overrides, every impossible combination, and errors of one line with the field's path."""

from pathlib import Path

import pytest
import yaml

from advgame.config import Config, build_config, describe_fields, dump_config, load_config, parse_overrides
from advgame.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TINY = next(p for p in CONFIGS if p.name == "tiny.yaml")

MODELS = {
    "data": {"train": "seeds.jsonl"},
    "attacker": {"model": "a"},
    "defender": {"model": "d"},
    "judge": {"kind": "llm", "model": "j"},
}


def with_(**sections):
    tree = {name: dict(section) for name, section in MODELS.items()}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_resolves_and_survives_a_round_trip(path):
    config = load_config(path)
    assert build_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_published_settings():
    for name in ("qwen2.5-7b.yaml", "llama3.1-8b.yaml", "qwen2.5-0.5b.yaml"):
        config = load_config(TINY.parent / name)
        learn = config.learn
        assert (learn.objective, learn.beta, learn.lr, learn.lr_final) == ("dpo", 0.1, 1e-6, 0.2)
        assert (learn.betas, learn.weight_decay, learn.clip_norm, learn.ema_decay) == ((0.9, 0.95), 0.1, 1.0, 0.95)
        assert (config.run.steps, config.run.validate_every, config.run.checkpoint_every) == (1000, 25, 50)
        assert (config.game.attacks, config.game.responses) == (2, 2)
        for player in (config.attacker, config.defender):
            assert (player.sampling.temperature, player.sampling.top_p) == (0.6, 0.9)
    seven = load_config(TINY.parent / "qwen2.5-7b.yaml")
    assert (seven.data.harmful, seven.data.benign) == (32, 32)  # 4 seeds for each of 8 trainer ranks
    assert (seven.defender.sampling.max_tokens, seven.judge.sampling.max_tokens) == (2048, 8192)


def test_overrides():
    assert parse_overrides(["--learn.beta", "0.2", "--run.name=x", "--learn.lr", "1e-4"]) == [
        ("learn.beta", 0.2),
        ("run.name", "x"),
        ("learn.lr", 1e-4),
    ]
    config = load_config(
        TINY, ["--learn.beta", "0.2", "--attacker.sampling.temperature", "0.5", "--game.optimistic", "false"]
    )
    assert (config.learn.beta, config.attacker.sampling.temperature, config.game.optimistic) == (0.2, 0.5, False)


BAD_TREES = {
    "unknown key": ({"learn": {"bta": 0.1}}, "learn.bta: unknown key; did you mean 'beta'?"),
    "unknown section": ({"lern": {}}, "lern: unknown key; did you mean 'learn'?"),
    "unknown nested key": ({"attacker": {"sampling": {"temp": 1}}}, "attacker.sampling.temp: unknown key"),
    "wrong type": ({"learn": {"beta": "much"}}, "learn.beta: input should be a valid number"),
    "out of range": ({"learn": {"ema_decay": 1.5}}, "learn.ema_decay: input should be less than 1"),
    "not one of": ({"learn": {"objective": "ppo"}}, "learn.objective: input should be 'dpo'"),
    "neither world nor seeds": ({}, "data.train: give a seed file"),
    "no player": (with_(attacker={"model": None}), "attacker.model: give a Hugging Face model folder"),
    "rule judge outside the world": (with_(judge={"kind": "rule", "model": None}), "judge.kind: the rule judge"),
    "llm judge without a model": (with_(judge={"model": None}), "judge.model: an llm judge needs"),
    "swap of a pointwise judge": (with_(judge={"mode": "pointwise", "swap": True}), "judge.swap: a pointwise"),
    "noise of an llm judge": (with_(judge={"noise": 1.0}), "judge.noise, judge.bias: only the rule judge"),
    "off-policy importance weights": (
        with_(learn={"objective": "grpo", "importance_weights": True}),
        "learn.importance_weights: only for on-policy grpo",
    ),
    "on-policy with the sampler as reference": (
        with_(rollout={"source": "live"}, learn={"reference": "rollout"}),
        "learn.reference: rollout needs the sampler to be the reference",
    ),
    "frozen reference off-policy": (with_(learn={"reference": "initial"}), "learn.reference: initial is for on-policy"),
    "nll without pairs": (with_(learn={"objective": "grpo", "nll_weight": 0.1}), "learn.nll_weight: an NLL"),
    "pairs of one": (with_(game={"responses": 1}), "game.responses: the Defender's preference pairs need"),
    "nobody learns": (
        with_(attacker={"frozen": True}, defender={"frozen": True}),
        "attacker.frozen, defender.frozen: nobody would learn",
    ),
    "rounds of a fixed player": (
        with_(attacker={"frozen": True}, learn={"schedule": "sequential"}),
        "learn.schedule: sequential rounds need both",
    ),
    "self-play with pairs": (with_(game={"self_play": True}), "game.self_play: Self-RedTeam needs"),
    "off-policy reinforce": (with_(learn={"objective": "reinforce"}), "learn.objective: reinforce is on-policy"),
    "not finite": ({"learn": {"lr": float("inf")}}, "learn.lr: input should be a finite number"),
    "no seeds": (with_(data={"train": "x", "harmful": 0, "benign": 0}), "data.harmful, data.benign: a step needs"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_bad_settings_are_one_line_with_the_fields_path(case):
    tree, message = BAD_TREES[case]
    with pytest.raises(InputError) as caught:
        build_config(tree, "my.yaml")
    text = str(caught.value)
    assert text.startswith(f"my.yaml: {message}")
    assert "\n" not in text


def test_a_player_that_does_not_learn_needs_no_pairs():
    build_config(with_(attacker={"frozen": True}, game={"attacks": 1}), "x")
    build_config(with_(defender={"frozen": True}, game={"responses": 1}), "x")


def test_text_stays_text():
    config = load_config(TINY, ["--run.purpose", "hardening: our bot", "--run.name", "2024"])
    assert (config.run.purpose, config.run.name) == ("hardening: our bot", "2024")


def test_a_pointwise_judge_with_pairwise_templates(tmp_path):
    (tmp_path / "judge_pair_compliance.md").write_text("{query} {answer_a} {answer_b}")
    tree = with_(judge={"mode": "pointwise"}, game={"templates": str(tmp_path)})
    with pytest.raises(InputError, match=r"game.templates: .* judge_pair_.* but judge.mode is pointwise"):
        build_config(tree, "my.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("learn: [", "not readable as YAML"), ("- a\n- b", "mapping of sections, found list"), ("\xff", "not readable")],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        load_config(path)


@pytest.mark.parametrize("words", [["beta"], ["--learn.beta"], ["--"]])
def test_bad_overrides(words):
    with pytest.raises(InputError):
        parse_overrides(words)


def test_every_field_is_documented():
    fields = list(describe_fields(Config))
    assert len(fields) > 60
    for name, _, meaning in fields:
        assert meaning.endswith((".", ")")), f"{name} has no description"


def test_an_override_changes_one_of_two_aliased_sections(tmp_path):
    """configs/ write `defender: *player`; YAML hands both names the same object."""
    path = tmp_path / "c.yaml"
    path.write_text("world: {}\njudge: {kind: rule}\nattacker: &player\n  sampling: {top_p: 0.9}\ndefender: *player\n")
    config = load_config(path, ["--defender.sampling.top_p", "0.5"])
    assert (config.attacker.sampling.top_p, config.defender.sampling.top_p) == (0.9, 0.5)
