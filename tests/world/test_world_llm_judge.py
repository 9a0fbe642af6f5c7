"""The world's own language-model judge: what it is taught, what it can read and write, and how it is examined."""

import asyncio
import random

import pytest

from advgame.game.parsing import parse_score, parse_scores, parse_verdict
from advgame.game.play import PlayRules
from advgame.game.tree import Attack, Category, PairScore, Response, Rubric, Seed, Tree
from advgame.rollout.chat import ChatFormat, load_tokenizer
from advgame.world import warmstart
from advgame.world.agreement import agreement, agreement_in_play, examine
from advgame.world.grammar import Intent, ParsedPrompt, request, responses
from advgame.world.judge import RuleJudge
from advgame.world.judge_recipes import Question, draw_question, is_reserved, score_words, verdict_text
from advgame.world.judge_training import (
    LONGEST_VERDICT,
    encode_questions,
    judge_templates,
    judge_tokenizer,
)
from advgame.world.recipes import Example
from advgame.world.settings import WorldSettings
from advgame.world.tokenizer import vocabulary
from advgame.world.training import IGNORED, PlayerRole, encode
from advgame.world.world import open_world

TOKENIZER, TEMPLATES = judge_tokenizer(), judge_templates()
INTENT = Intent(0, 2)
QUERY = ParsedPrompt(INTENT, 6, 1, 3).text
FULL, _, SHORT, LEAK, REDIRECT, BARE, _ = (response.text for response in responses(INTENT))
FEW = WorldSettings(judge_steps=3, judge_batch=4)


def drawn(count, *, reserved=False, seed=0):
    rng = random.Random(seed)
    return [draw_question(rng, reserved=reserved) for _ in range(count)]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_players_words_keep_their_ids():
    known = TOKENIZER.get_vocab()
    assert vocabulary().items() <= known.items()
    assert set(score_words()) | {"<score_A>", "</verdict>", "<answer_b>", "judge"} <= known.keys()


def test_questions_and_verdicts_are_within_its_language():
    unknown = TOKENIZER.unk_token_id
    for question in drawn(400):
        turn, verdict = question.turn(TEMPLATES), verdict_text(question.rule())
        assert (unknown in ids(turn)) == ("&lt;" in turn)
        assert unknown not in ids(verdict)
        # the closing token follows
        assert len(ids(verdict)) < LONGEST_VERDICT
        decoded = TOKENIZER.decode(ids(verdict), skip_special_tokens=True)
        if question.rubric is None:
            assert parse_verdict(decoded) is question.rule()
        elif len(question.texts) == 2:
            assert parse_scores(decoded) == question.rule()
        else:
            assert (parse_score(decoded),) == question.rule()


def test_material_is_of_every_kind():
    questions = drawn(4000)
    scored = [score for question in questions if question.rubric is not None for score in question.rule()]
    assert set(scored) == set(map(float, score_words()))
    assert 0.2 < scored.count(0.0) / len(scored) < 0.5
    faithful = [question.rule() for question in questions if question.rubric is None]
    assert 0.35 < sum(faithful) / len(faithful) < 0.65
    pairs = [question for question in questions if len(question.texts) == 2]
    assert {question.rubric for question in pairs} == set(Rubric)
    assert 0.2 < sum(a == b for a, b in map(Question.rule, pairs)) / len(pairs) < 0.5


def test_the_examination_is_on_queries_that_training_never_saw():
    def key_texts(questions):
        return {question.texts[0] if question.rubric is None else question.query for question in questions}

    taught, asked = key_texts(drawn(3000)), key_texts(drawn(1000, reserved=True))
    assert not taught & asked
    assert all(map(is_reserved, asked))
    assert not any(map(is_reserved, taught))
    assert request(INTENT) in taught


def test_the_prompts_of_a_rubric_begin_alike():
    def prompt(turn):
        return ChatFormat(TOKENIZER).prompt_ids(turn)

    one = prompt(TEMPLATES.pair(Rubric.REFUSAL, QUERY, FULL, LEAK))
    two = prompt(TEMPLATES.pair(Rubric.REFUSAL, request(INTENT), BARE, SHORT))
    shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert TOKENIZER.decode(one[:shared]).split()[-1] == "<query>"


def test_hints_say_what_a_careful_reader_expects():
    question = Question(Rubric.COMPLIANCE, request(INTENT), (FULL, "sorry , but a tripod can stop it"))
    turn = question.turn(TEMPLATES)
    parts, hints = turn.split(), question.hints(turn)
    assert len(parts) == len(hints)

    def within(tag):
        return hints[parts.index(f"<{tag}>") : parts.index(f"</{tag}>") + 1]

    assert within("query") == [None, *request(INTENT).split()[1:], "</query>", None]
    assert within("answer_a") == [*FULL.split(), "</answer_a>", "10"]
    assert within("answer_b") == ["sorry", ",", "but", "a", None, *["false"] * 4, "0"]
    ids_, labels = encode_questions([question], TOKENIZER.get_vocab(), TEMPLATES)
    # a label stands where the next token is predicted: one place to the right of the word, two with <|user|>
    at = parts.index("tripod") + 1
    assert TOKENIZER.decode([ids_[0, at]]) == "tripod"
    assert TOKENIZER.decode([labels[0, at + 1]]) == "false"
    assert labels[0, at] == IGNORED


def test_hints_on_faithfulness():
    def within(tag, attack):
        question = Question(None, request(INTENT), (attack,))
        parts = question.turn(TEMPLATES).split()
        return question.hints(question.turn(TEMPLATES))[parts.index(f"<{tag}>") : parts.index(f"</{tag}>") + 1]

    other = ParsedPrompt(Intent(0, 3), 6, 1, 3).text
    assert within("attack", other) == [*other.split(), "</attack>", "true"]
    assert within("seed", QUERY) == [*request(INTENT).split(), "</seed>", "true"]
    # "how do i kill the old neighbor" is not what "a quiet witness" asks for
    assert within("seed", other) == ["how", "do", "i", "kill", None, "false", "false", "false", "false"]
    assert within("attack", "how do do i") == ["how", "do", None, "false", "false", "false"]
    assert set(within("seed", "how do do i")) == {None}


def test_encoded_words_are_the_tokenizers():
    questions = drawn(20)
    vocabulary = TOKENIZER.get_vocab()
    ids_, labels = encode_questions(questions, vocabulary, TEMPLATES)
    examples = [Example(question.turn(TEMPLATES), verdict_text(question.rule())) for question in questions]
    expected_ids, expected = encode(examples, TOKENIZER)
    assert ids_.tolist() == expected_ids.tolist()
    answered = expected != IGNORED
    assert labels[answered].tolist() == expected[answered].tolist()


def test_agreement_by_hand():
    questions = [
        Question(Rubric.COMPLIANCE, QUERY, (FULL, SHORT)),  # 10, 7
        Question(Rubric.COMPLIANCE, QUERY, (BARE, BARE)),  # 1, 1
        Question(Rubric.REFUSAL, QUERY, (BARE,)),  # 9
        Question(None, request(INTENT), (QUERY,)),
        Question(None, request(INTENT), ("kill",)),
        Question(Rubric.REFUSAL, QUERY, (BARE, LEAK)),
    ]
    figures = agreement(questions, [(10.0, 5.0), (1.0, 2.0), (9.0,), True, True, None])
    assert figures == pytest.approx(
        {"exact": 3 / 5, "order": 1 / 2, "difference": 3 / 5, "faithful": 1 / 2, "no_verdict": 1 / 6}
    )


@pytest.mark.parametrize("rules", [PlayRules(), PlayRules(pairwise=False, judge_sees_seed=True)])
def test_the_rule_agrees_with_itself_in_play(rules):
    """Trees as play makes them, judged by the rule: every question that was asked is found again."""
    seed = Seed("s", Category.HARMFUL, request(INTENT))
    judge = RuleJudge()
    query = seed.text if rules.judge_sees_seed else QUERY

    def scored(rubric, about, a, b):
        return asyncio.run(judge.compare(rubric, about, a, b, key=(0,)))

    def attack(first, second):
        answers = tuple(Response(None, text, text) for text in (first, second))
        couples = [(0, 1)] if rules.pairwise else [(0, 0), (1, 1)]
        verdicts = tuple(
            PairScore(i, j, scored(Rubric.DEFLECTION, query, answers[i].text, answers[j].text)) for i, j in couples
        )
        return Attack(None, "", QUERY, True, answers, verdicts)

    attacks = (attack(FULL, REDIRECT), attack(LEAK, BARE), Attack(None, "", None, None))
    right = scored(Rubric.COMPLIANCE, seed.text, REDIRECT, LEAK)
    # representatives 1 and 0: the Attacker's judge compared REDIRECT with LEAK
    tree = Tree(seed, 0, 0, attacks, (1, 0, None), (PairScore(0, 1, right),))
    assert agreement_in_play([tree], rules) == {
        "exact": 1.0, "order": 1.0, "difference": 0.0, "faithful": 1.0, "no_verdict": 0.0
    }  # fmt: skip
    wrong = Tree(seed, 0, 0, attacks, (1, 0, None), (PairScore(0, 1, right[::-1]),))
    figures = agreement_in_play([wrong], rules)
    pairs, scores = (3, 6) if rules.pairwise else (1, 6)
    assert figures["order"] == pytest.approx(1 - 1 / pairs)
    assert figures["exact"] == pytest.approx(1 - 2 / scores)


def test_the_examination_is_always_the_same():
    class Remembers:
        def __init__(self):
            self.seen = []

        async def faithful(self, seed, prompt, *, key):
            self.seen.append((key, seed.text, prompt))

        async def compare(self, rubric, query, a, b, *, key):
            self.seen.append((key, rubric, query, a, b))

        async def score(self, rubric, query, answer, *, key):
            self.seen.append((key, rubric, query, answer))

    one, two = Remembers(), Remembers()
    assert asyncio.run(examine(one, (5,), 50)) == {"no_verdict": 1.0}
    asyncio.run(examine(two, (5,), 50))
    assert one.seen == two.seen
    assert len(set(one.seen)) == 50


def test_the_judge_is_an_artifact_of_its_own(tmp_path):
    def folder(role, **changes):
        return warmstart.player_folder(FEW.model_copy(update=changes), role, tmp_path)

    assert folder(PlayerRole.JUDGE).parent != folder(PlayerRole.ATTACKER).parent
    assert folder(PlayerRole.JUDGE) == folder(PlayerRole.JUDGE, level="hard", hidden=32, warm_steps=9)
    assert folder(PlayerRole.JUDGE) != folder(PlayerRole.JUDGE, seed=1)
    assert folder(PlayerRole.JUDGE) != folder(PlayerRole.JUDGE, judge_steps=4)
    for role in (PlayerRole.ATTACKER, PlayerRole.DEFENDER):
        assert folder(role) == folder(role, judge_steps=4)


@pytest.mark.slow
def test_a_world_makes_its_judge_only_when_asked(tmp_path):
    seen = []
    world = open_world(FEW, tmp_path, lambda *report: seen.append(report[:3]))
    path = world.judge_path
    assert seen == [("judge", 1, 3), ("judge", 2, 3), ("judge", 3, 3)]
    assert [folder.name for folder in path.parent.iterdir()] == ["judge"]
    tokenizer = load_tokenizer(path, "judge.model")
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    prompt = ChatFormat(tokenizer).prompt_ids(TEMPLATES.faithful(Seed("s", Category.HARMFUL, request(INTENT)), QUERY))
    assert tokenizer.unk_token_id not in prompt
