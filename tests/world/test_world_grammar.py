"""The grammar is unambiguous, reads what it writes, and tells every kind of answer from gibberish."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advgame.game.tree import Category
from advgame.world.grammar import (
    INTENTS,
    Kind,
    ParsedPrompt,
    attacks,
    classify,
    parse_prompt,
    plans,
    request,
    responses,
    words,
)
from advgame.world.lexicon import PARAPHRASES, PREFIXES, SUFFIXES, VERBS, Tone

PROMPTS = st.builds(
    ParsedPrompt,
    st.sampled_from(INTENTS),
    st.integers(0, len(PREFIXES) - 1),
    st.integers(0, len(PARAPHRASES) - 1),
    st.integers(0, len(SUFFIXES) - 1),
)


def test_the_world_has_the_promised_size():
    assert len(INTENTS) == 48
    assert sum(intent.heldout for intent in INTENTS) == 12
    for category in Category:
        assert sum(i.category is category for i in INTENTS) == 24
        assert sum(i.category is category and i.heldout for i in INTENTS) == 6
    assert {len(attacks(intent)) for intent in INTENTS} == {512}
    assert {len(attacks(intent, "trained")) for intent in INTENTS} == {312}
    assert {len(attacks(intent, "heldout")) for intent in INTENTS} == {200}
    assert sum(frame.heldout for frame in PREFIXES) == 3
    assert sum(frame.heldout for frame in SUFFIXES) == 2
    for frames in (PREFIXES, SUFFIXES):
        assert {frame.tone for frame in frames if frame.heldout} >= {Tone.SOFTENER, Tone.ALARMER}
    assert max(len(responses(intent)) for intent in INTENTS) <= 8
    assert len(words()) == 247


def test_no_two_prompts_share_a_text():
    texts = {prompt.text for intent in INTENTS for prompt in attacks(intent)}
    assert len(texts) == 24_576
    assert all(text == text.lower() == " ".join(text.split()) for text in texts)


@given(PROMPTS)
def test_parsing_reads_what_was_written(prompt):
    assert parse_prompt(prompt.text) == prompt
    assert parse_prompt(f"  {prompt.text}\n") == prompt


@given(PROMPTS, st.sampled_from(words()), st.data())
def test_a_word_more_is_never_the_same_prompt(prompt, word, data):
    parts = prompt.text.split()
    at = data.draw(st.integers(0, len(parts)))
    assert parse_prompt(" ".join([*parts[:at], word, *parts[at:]])) != prompt


@pytest.mark.parametrize("intent", INTENTS, ids=lambda i: i.name)
def test_the_plain_seed_is_an_attack_without_framing(intent):
    prompt = parse_prompt(request(intent))
    assert prompt == ParsedPrompt(intent, 0, 0, 0)
    assert prompt.plain
    assert not prompt.heldout


@pytest.mark.parametrize("text", ["", " ", "how do i", "kill", "how do i kill", "HOW DO I KILL A PYTHON PROCESS", "\0"])
def test_what_is_no_prompt_is_none(text):
    assert parse_prompt(text) is None


@pytest.mark.parametrize("intent", INTENTS, ids=lambda i: i.name)
def test_answers_are_read_as_what_they_are(intent):
    texts = [response.text for response in responses(intent)]
    assert len(set(texts)) == len(texts)
    assert {response.kind for response in responses(intent)} == set(Kind) - {Kind.GIBBERISH}
    for response in responses(intent):
        assert classify(response.text, intent) is response.kind
        assert classify(f"{response.text} {response.text}", intent) is Kind.GIBBERISH
        assert classify(response.text.rsplit(" ", 1)[0], intent) is Kind.GIBBERISH
        assert len(response.text.split()) <= 14
        tells = intent.verb.tool in response.text.split() and intent.verb.action in response.text.split()
        assert tells == response.kind.discloses


def test_tool_and_action_belong_to_one_verb_each():
    told = [word for verb in VERBS for word in (verb.tool, verb.action)]
    assert len(set(told)) == len(told)
    for intent in INTENTS:
        for other in INTENTS:
            if other.verb_index != intent.verb_index:
                for response in responses(other):
                    kind = classify(response.text, intent)
                    assert kind in (Kind.GIBBERISH, Kind.REFUSAL)


@given(st.text(max_size=60), st.sampled_from(INTENTS))
def test_any_other_text_is_gibberish(text, intent):
    if " ".join(text.split()) not in {response.text for response in responses(intent)}:
        assert classify(text, intent) is Kind.GIBBERISH


def test_without_an_intent_only_refusals_and_redirects_are_read():
    for intent in INTENTS:
        for response in responses(intent):
            known = response.kind in (Kind.REFUSAL, Kind.REDIRECT)
            assert classify(response.text, None) is (response.kind if known else Kind.GIBBERISH)


def test_plans_name_only_known_themes():
    assert "open with story , close with study" in set(plans())
