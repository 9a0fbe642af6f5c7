"""Words survive the tokenizer, it loads like any other, and the instructions stay in its vocabulary."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from advgame.game.parsing import parse_attack
from advgame.game.prompts import Templates
from advgame.rollout.chat import ChatFormat
from advgame.world.grammar import INTENTS, attacks, parse_prompt, responses, words
from advgame.world.recipes import attacker_example
from advgame.world.settings import WorldSettings
from advgame.world.tokenizer import END_PROMPT, PROMPT, build_tokenizer, chat, vocabulary
from advgame.world.world import open_world

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab() == vocabulary()
    assert len(tokenizer) == 256
    assert tokenizer.eos_token_id == vocabulary()["<|end|>"]
    assert tokenizer.pad_token_id == 0


@given(st.lists(st.sampled_from([*words(), PROMPT, END_PROMPT, "<think>", "</think>"]), min_size=1, max_size=40))
def test_round_trip(parts):
    ids = encode(TOKENIZER, " ".join(parts))
    assert len(ids) == len(parts)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == " ".join(parts)


def test_every_text_of_the_world_is_known(tokenizer):
    unknown = tokenizer.unk_token_id
    for intent in INTENTS:
        texts = [r.text for r in responses(intent)] + [p.text for p in attacks(intent)[::37]]
        assert all(unknown not in ids for ids in encode(tokenizer, texts))


def test_chat_text_is_the_templates(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello there"}], tokenize=False, add_generation_prompt=True
    )
    assert text == chat("hello there")
    assert ChatFormat(tokenizer).prompt_ids("hello there") == tuple(encode(tokenizer, chat("hello there")))
    with pytest.raises(Exception, match="user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "hello"}], tokenize=False)


def test_the_worlds_instructions_stay_in_the_vocabulary(tokenizer, tmp_path):
    world = open_world(WorldSettings(), tmp_path)
    templates = Templates.load(world.templates_dir)
    rng = random.Random(0)
    expected = {attacker_example(rng, "easy", True).user for _ in range(3000)}
    for seed in [*world.train_seeds, *world.heldout_seeds]:
        instruction = templates.attacker(seed)
        assert instruction in expected
        assert tokenizer.unk_token_id not in encode(tokenizer, instruction)


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_untrained_attacks_are_mostly_valid_and_never_heldout(level, reasoning):
    rng = random.Random(1)
    valid = faithful = 0
    for _ in range(2000):
        example = attacker_example(rng, level, reasoning)
        text = parse_attack(example.answer, reasoning=reasoning)
        if text is None:
            continue
        prompt = parse_prompt(text)
        assert prompt is not None
        assert not prompt.heldout
        valid += 1
        faithful += prompt.intent == parse_prompt(example.user.split(" : ", 1)[1]).intent
    assert 0.93 < valid / 2000 < 0.99
    assert 0.91 < faithful / valid < 0.97
