"""Pairwise conventions by hand, both orders, and a whole comparison through the command."""

import asyncio
import json

import models
import numpy as np
import pytest
from eval_files import lines
from eval_server import Plan, serving, spec

from advgame.cli import main
from advgame.evals.comparers import ScoreComparer, both_orders
from advgame.evals.pairwise import Compared, arena_score, fit_logistic, length_controlled, win_rate
from advgame.game.tree import Rubric
from advgame.world.grammar import INTENTS, request, responses
from advgame.world.judge import RuleJudge


def test_win_rate_by_hand():
    games = [(2, 1), (1, -1), (0, 0), (None, -2), (None, None)]
    compared = [Compared(pair, 10, 10) for pair in games]
    found = win_rate(compared)
    assert (found.value, found.n) == ((1 + 0.5 + 0.5 + 0) / 4, 4)
    assert [one.swapped for one in compared] == [False, True, False, None, None]


def test_arena_score_by_hand():
    compared = [Compared((-2, 1), 0, 0), Compared((2, 0), 0, 0), Compared((None, 2), 0, 0)]
    # 0 0 0 1 | 1 1 1 .5; the question with a game missing is left out
    found = arena_score(compared)
    assert (found.value, found.n) == (4.5 / 8, 2)
    assert found.low < found.value < found.high


def test_length_control_takes_back_what_length_won():
    """A judge that only counts characters: the model wins by length alone, and is even without it."""
    rng = np.random.default_rng(0)
    compared = []
    for _ in range(400):
        length, other = int(rng.normal(900, 200)), int(rng.normal(600, 200))
        game = 1 if length > other else -1
        compared.append(Compared((game, game), length, other))
    raw, controlled = win_rate(compared), length_controlled(compared)
    assert raw.value > 0.8
    assert controlled.low < 0.5 < controlled.high
    assert abs(controlled.value - 0.5) < 0.1


def test_without_length_differences_control_changes_nothing():
    compared = [Compared((game, game), 50, 50) for game in (1, 1, 1, -1)]
    assert length_controlled(compared).value == pytest.approx(0.75, abs=1e-4)
    every = [Compared((1, 1), 10 * i, 7 * i) for i in range(20)]
    assert 0.9 < length_controlled(every).value <= 1.0


def test_the_fit_is_the_optimum_of_its_own_loss():
    rng = np.random.default_rng(1)
    design = np.stack([np.ones(60), rng.normal(size=60), rng.normal(size=60)], 1)
    target = rng.choice([0.0, 0.5, 1.0], 60)
    weights = fit_logistic(design, target)

    def loss(w):
        p = 1 / (1 + np.exp(-design @ w))
        likelihood = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
        return likelihood + 0.0005 * (w[1:] ** 2).sum() + 0.5e-6 * w[0] ** 2

    best = loss(weights)
    for step in np.eye(3) * 1e-3:
        assert loss(weights + step) > best
        assert loss(weights - step) > best


def test_a_judge_that_prefers_the_first_answer_is_caught_by_the_swap():
    intent = INTENTS[0]
    full, short = responses(intent)[0], responses(intent)[2]

    async def games(bias):
        comparer = ScoreComparer(RuleJudge(bias=bias), Rubric.COMPLIANCE)
        return Compared(await both_orders(comparer, request(intent), short.text, full.text, (1,)), 1, 1)

    assert asyncio.run(games(0.0)).games == (1, 1)
    assert asyncio.run(games(0.0)).swapped is False
    fooled = asyncio.run(games(3.0))
    assert fooled.swapped is True


def test_alpaca_and_arena_through_the_command(tmp_path):
    """The judge likes answers that say "good" and shouts where one says it twice; one verdict holds none."""

    def answer(text):
        if not text.startswith("Two assistants"):
            return "good good answer" if "two" in text else "good answer"
        a, b = (text.split(f"<answer_{x}>")[1].split(f"</answer_{x}>")[0].count("good") for x in "ab")
        if "question four" in text:
            return "I cannot say"
        return (
            f"[[{'A' if a > b else 'B'}{'>>' if abs(a - b) > 1 else '>'}{'B' if a > b else 'A'}]]"
            if a != b
            else "[[A=B]]"
        )

    names = ["one", "two", "three", "four"]
    rows = [{"instruction": f"question {n}", "output": "bad", "generator": "g"} for n in names]
    rows[2]["output"] = "good"
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    lines(tmp_path / "arena.jsonl", [{"uid": n, "category": "c", "prompt": f"question {n}"} for n in names])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": "good"}}]
    answers = [{"uid": n, "output": "bad"} for n in names]
    answers[2] = {"uid": "three", "messages": messages}
    lines(tmp_path / "base.jsonl", answers)
    with serving(Plan(answer)) as url:
        pairwise = [
            {"set": "alpaca-eval", "path": "alpaca.json", "judge": f"compare@{spec(url)}"},
            {"set": "arena-hard", "path": "arena.jsonl", "baseline": "base.jsonl", "judge": f"compare@{spec(url)}"},
        ]
        (tmp_path / "suite.yaml").write_text(json.dumps({"name": "p", "pairwise": pairwise}))
        words = ["--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
        assert main(["eval", spec(url), *words]) == 0
    (results,) = json.loads((tmp_path / "out/table.json").read_text())["results"].values()
    found = {(r["set"], r["metric"]): r for r in results}
    # one: better twice, two: far better twice, three: ties; four has no verdict
    alpaca = found["alpaca-eval", "win_rate"]
    assert (alpaca["estimate"]["value"], alpaca["estimate"]["n"], alpaca["parse_errors"]) == (2.5 / 3, 3, 2)
    arena = found["arena-hard", "win_rate"]
    assert (arena["estimate"]["value"], arena["estimate"]["n"]) == ((2 + 6 + 1) / 10, 3)
    assert found["arena-hard", "swap_disagreement"]["estimate"]["value"] == 0.0
    assert found["alpaca-eval", "length_controlled"]["estimate"]["n"] == 3


def test_bad_judges_get_one_line(tmp_path, capsys):
    folder = models.folder(tmp_path / "m")
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "q", "output": "a", "generator": "g"}]))
    for judge, says in (("gpt-4", "no judge 'gpt-4'"), ("rule?noice=1", "no judge"), ("score@/gone", "no such model")):
        tree = {"pairwise": [{"set": "alpaca-eval", "path": "alpaca.json", "judge": judge}]}
        (tmp_path / "suite.yaml").write_text(json.dumps(tree))
        assert main(["eval", str(folder), "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "o")]) == 2
        assert says in capsys.readouterr().err
