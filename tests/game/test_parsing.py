"""Parsing: attacks and responses strictly, verdicts by their last match, all in linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame.game.parsing import (
    after_reasoning,
    parse_attack,
    parse_response,
    parse_score,
    parse_scores,
    parse_verdict,
)

TAGS = ["<think>", "</think>", "<prompt>", "</prompt>", "<PROMPT>", "</Think>"]
SOUP = st.lists(st.sampled_from([*TAGS, " ", "\n", "a", "b c", "\u200b", "<"]), max_size=12).map("".join)
CLEAN = st.text(max_size=40).filter(lambda t: "<" not in t)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("<think>plan</think><prompt>do it</prompt>", "do it"),
        (" <think>plan</think>\n\n<prompt>\n do it\n</prompt> \n", "do it"),
        ("<think></think><prompt>x < y and <b>z</b></prompt>", "x < y and <b>z</b>"),
        ("<prompt>do it</prompt>", None),
        ("<think>plan</think>", None),
        ("<think>plan</think> so <prompt>do it</prompt>", None),
        ("well <think>plan</think><prompt>do it</prompt>", None),
        ("<think>plan</think><prompt>do it</prompt> done", None),
        ("<think>plan</think><prompt> \n\u200b</prompt>", None),
        ("<think>a<think>b</think></think><prompt>do it</prompt>", None),
        ("<think>a</think><prompt><prompt>do it</prompt></prompt>", None),
        ("<think>a</think><prompt>do</prompt><prompt>it</prompt>", None),
        ("<think>a</think><prompt>do <THINK>it</prompt>", None),
        ("<think>a <prompt>b</prompt></think><prompt>do it</prompt>", None),
        ("<prompt>do it</prompt><think>plan</think>", None),
        ("<think>a<prompt>b</think></prompt>", None),
        ("<think>plan<prompt>do it</prompt>", None),
        ("<think>plan</think><prompt>do it", None),
        ("", None),
    ],
)
def test_attack_with_reasoning(text: str, prompt: str | None):
    assert parse_attack(text, reasoning=True) == prompt


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (" <prompt> do it </prompt>\n", "do it"),
        ("<think>plan</think><prompt>do it</prompt>", None),
        ("<prompt>do <think>it</prompt>", None),
        ("<prompt></prompt>", None),
        ("do it", None),
    ],
)
def test_attack_without_reasoning(text: str, prompt: str | None):
    assert parse_attack(text, reasoning=False) == prompt


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("  an answer\n", False, "an answer"),
        ("<think>kept</think> an answer", False, "<think>kept</think> an answer"),
        (" \n\u200b ", False, None),
        ("", False, None),
        ("<think>hm</think>\nan answer", True, "an answer"),
        ("<think>hm</think>\n", True, None),
        ("an answer", True, None),
        ("so <think>hm</think> an answer", True, None),
        ("<think>hm an answer", True, None),
        ("<think>hm</think> an <think>answer</think>", True, None),
        ("<think>hm</think> an answer</THINK>", True, None),
        ("</think>hm<think> an answer", True, None),
    ],
)
def test_response(text: str, reasoning: bool, answer: str | None):
    assert parse_response(text, reasoning=reasoning) == answer


@settings(max_examples=200, deadline=None)
@given(CLEAN, CLEAN.filter(lambda t: any(c.isalnum() for c in t)))
def test_what_was_put_in_comes_out(plan: str, prompt: str):
    text = f"<think>{plan}</think>\n<prompt>{prompt}</prompt>"
    assert parse_attack(text, reasoning=True) == prompt.strip()
    assert parse_response(f"<think>{plan}</think>{prompt}", reasoning=True) == prompt.strip()


@settings(max_examples=300, deadline=None)
@given(SOUP, st.booleans())
def test_a_parsed_attack_holds_no_tag_and_was_the_whole_text(text: str, reasoning: bool):
    prompt = parse_attack(text, reasoning=reasoning)
    if prompt is not None:
        assert prompt == prompt.strip() != ""
        assert not any(tag.lower() in prompt.lower() for tag in TAGS)
        head, _, tail = text.strip().partition("</think>") if reasoning else ("", "", text)
        assert tail.strip().removeprefix("<prompt>").removesuffix("</prompt>").strip() == prompt
        assert not reasoning or head.startswith("<think>")


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("<score_A>7</score_A>\n<score_B>2.5</score_B>", (7.0, 2.5)),
        ("<score_B> 2 </score_B> then <score_A>\n.5\n</score_A>", (0.5, 2.0)),
        ("<SCORE_a>3</score_A><score_b>4.</score_B>", (3.0, 4.0)),
        ("<score_A>1</score_A><score_B>1</score_B> no: <score_A>9</score_A>", (9.0, 1.0)),
        ("<score_A>1</score_A><score_B>2</score_B> <score_A>unsure</score_A>", (1.0, 2.0)),
        ("<score_A>-3</score_A><score_B>+12</score_B>", (0.0, 10.0)),
        ("<think><score_A>1</score_A></think><score_B>2</score_B>", (1.0, 2.0)),
        ("<score_A>7</score_A>", None),
        ("<score>7</score>", None),
        ("<score_A>nan</score_A><score_B>1</score_B>", None),
        ("<score_A>inf</score_A><score_B>1</score_B>", None),
        ("<score_A>1e3</score_A><score_B>1</score_B>", None),
        ("<score_A>8/10</score_A><score_B>1</score_B>", None),
        ("<score_A>٧</score_A><score_B>1</score_B>", None),
        ("<score_A></score_A><score_B>1</score_B>", None),
        ("<score_A>7<score_B>1</score_B>", None),
        ("<score_A>" + "9" * 400 + "</score_A><score_B>1</score_B>", None),
        ("", None),
    ],
)
def test_scores(text: str, scores: tuple[float, float] | None):
    assert parse_scores(text) == scores


@settings(max_examples=100, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20), st.text(max_size=20))
def test_any_decimals_are_read_and_clipped(a: float, b: float, noise: str):
    text = f"{noise}<score_A>{a:.3f}</score_A>{noise}<score_B>{b:.3f}</score_B>"
    clip = [min(max(round(x, 3), 0.0), 10.0) for x in (a, b)]
    assert parse_scores(text) == pytest.approx(clip, abs=1e-9)


def test_single_score():
    assert parse_score("<score>3</score> rather <score>4.5</score>") == 4.5
    assert parse_score("<score_A>3</score_A>") is None
    assert parse_score("3") is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<verdict>true</verdict>", True),
        ("<verdict> False\n</VERDICT>.", False),
        ("<verdict>true</verdict> wait <verdict>false</verdict>", False),
        ("<think><verdict>false</verdict></think> <verdict>true</verdict>", True),
        ("<think><verdict>false</verdict></think> done", False),
        ("<verdict>yes</verdict>", None),
        ("<verdict>true", None),
        ("true", None),
    ],
)
def test_verdict(text: str, verdict: bool | None):
    assert parse_verdict(text) == verdict


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * (MEGABYTE // 7),
        "<think>" + "<" * MEGABYTE + "</think><prompt>x</prompt>",
        "<think></think>" + " " * MEGABYTE + "<prompt>x</prompt>",
        "<think></think><prompt>" + "\u200b" * MEGABYTE + "</prompt>",
        "<score_A>" * (MEGABYTE // 9),
        "<score_A>" + " " * MEGABYTE,
        "<score_A>" + "1" * MEGABYTE + "</score_A>",
        "<score_A>1</score_A>" * (MEGABYTE // 20),
        ("<verdict>" + " " * 91) * (MEGABYTE // 100),
        " " * MEGABYTE,
    ],
)
def test_a_megabyte_of_anything_is_read_in_linear_time(text: str):
    start = time.perf_counter()
    for reasoning in (True, False):
        parse_attack(text, reasoning=reasoning)
        parse_response(text, reasoning=reasoning)
    parse_scores(text), parse_score(text), parse_verdict(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        (" <think>a</think>\n b ", "b"),
        ("<think>a</think>b</think>c", "b</think>c"),  # what comes after the block is all shown
        ("begun by the template</think>b", "b"),
        ("<think>never ends", ""),
        ("<think>a</think>", ""),
        ("b <think>a</think> c", "b <think>a</think> c"),
        ("", ""),
    ],
)
def test_what_a_reader_sees_of_a_response(text, shown):
    assert after_reasoning(text) == shown
