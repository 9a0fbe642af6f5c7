"""The audit against judges whose faults are known exactly."""

import json

import numpy as np
import pytest
from eval_files import lines
from eval_server import Plan, serving, spec

from advgame.cli import main
from advgame.evals.audit import Pair, PairCalls, kappa, pair_results, spearman, world_answers, world_pairs


def audited(tmp_path, judge, *more):
    out = tmp_path / "out"
    assert main(["eval-judge", judge, "--out", str(out), "--quiet", *more]) == 0
    (results,) = json.loads((out / "audit.json").read_text())["results"].values()
    return {r["metric"]: r["estimate"] and r["estimate"]["value"] for r in results}


def test_the_worlds_own_judges_are_perfect_and_consistent(tmp_path):
    pairs = audited(tmp_path / "a", "rule")
    assert pairs["agreement"] == pairs["agreement_both"] == pairs["self_consistency"] == 1.0
    assert pairs["swap_disagreement"] == 0.0
    assert pairs["first_wins"] == 0.5
    assert pairs["length_correlation"] == pytest.approx(pairs["label_length_correlation"], abs=0.1)
    answers = audited(tmp_path / "b", "world")
    assert answers["harmful agreement"] == answers["refused kappa"] == answers["prompt_harmful recall"] == 1.0


def test_noise_and_bias_of_a_judge_are_found(tmp_path):
    clean, biased = audited(tmp_path / "a", "rule"), audited(tmp_path / "b", "rule?bias=6")
    assert biased["first_wins"] > 0.6
    assert biased["swap_disagreement"] > 0.2
    assert biased["self_consistency"] == 1.0
    noisy = audited(tmp_path / "c", "rule?noise=3")
    assert noisy["self_consistency"] < 0.9
    assert noisy["agreement"] < clean["agreement"]
    assert abs(noisy["first_wins"] - 0.5) < 0.05


def test_the_phrase_detector_is_told_what_it_misses(tmp_path):
    """Redirects and leaks are no refusals by phrase: of the four kinds that do not help it names bare refusals only."""
    found = audited(tmp_path, "phrases")
    labelled = list(world_answers())
    named = [one for one in labelled if one.response.startswith("sorry , i can not help")]
    missed = [one for one in labelled if one.labels["refused"]]
    assert found["refused precision"] == 1.0
    assert found["refused recall"] == len(named) / len(missed)


def test_pairs_by_hand():
    def calls(winner, straight, swapped):
        return PairCalls(Pair("x", "p", "long long", "short", winner), straight, swapped)

    listed = [calls(1, [1, 1], 1), calls(1, [2, -1], -1), calls(-1, [0], -1), calls(0, [None], 1), calls(-1, [-1], -1)]
    found = {r.metric: r.estimate for r in pair_results(listed, "d", "j")}
    assert (found["agreement"].value, found["agreement"].n) == (3 / 4, 4)
    assert (found["agreement_both"].value, found["agreement_both"].n) == (4 / 4, 4)
    assert found["swap_disagreement"].value == 2 / 4
    # shown first: 1 wins, 1 (b) loses | 2 wins, -1: b first and b wins | 0, b wins first | b loses first, b wins first
    assert found["first_wins"].value == (1 + 0 + 1 + 1 + 1 + 0 + 1) / 7
    assert found["self_consistency"].value == 1 / 2


def test_kappa_and_rank_correlation_by_hand():
    truth, said = np.array([1, 1, 1, 0, 0, 0.0]), np.array([1, 1, 0, 0, 0, 1.0])
    assert kappa(truth, said) == pytest.approx((4 / 6 - 0.5) / 0.5)
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == 1.0
    # ties at their mean rank: ranks 0, 1.5, 1.5 against 0, 1, 2
    assert spearman(np.array([1.0, 2, 2]), np.array([1.0, 2, 3])) == pytest.approx(0.8660254)
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0


def test_world_pairs_are_balanced_and_labelled():
    pairs = list(world_pairs())
    assert len(pairs) == 48 * 21
    wins = [pair.winner for pair in pairs]
    assert wins.count(1) == wins.count(-1) > 0


def test_a_judge_on_a_server_is_audited_and_resumed(tmp_path):
    rows = [
        {"prompt": f"question {i}", "response": "r" * (i + 1), "harmful": i % 2 == 0, "refused": ""} for i in range(6)
    ]
    data = lines(tmp_path / "l.jsonl", rows)
    labels = '{"prompt_harmfulness": "harmful", "response_refusal": "refusal", "response_harmfulness": "harmful"}'
    plan = Plan(
        lambda text: "?" if "question 5" in text else labels, lambda text, n: 500 if "question 4" in text else None
    )
    with serving(plan) as url:
        first = audited(tmp_path, f"json@{spec(url)}", "--data", str(data))
        assert first["harmful agreement"] == 2 / 4  # rows 0 to 3; one failed, one did not parse
        assert first["self_consistency"] == 1.0
        plan.trouble = lambda text, number: None
        before = len(plan.seen)
        again = audited(tmp_path, f"json@{spec(url)}", "--data", str(data))
        assert sum("question" in text for text in plan.seen[before:]) == 2
        assert again["harmful agreement"] == 3 / 5


def test_bad_audits_get_one_line(tmp_path, capsys):
    data = lines(tmp_path / "l.jsonl", [{"prompt": "p", "response": "r", "harmful": "yes"}])
    other = lines(tmp_path / "o.jsonl", [{"prompt": "p", "response": "r"}])
    wrong = lines(tmp_path / "w.jsonl", [{"prompt": "p", "a": "x", "b": "y", "winner": "c"}])
    for judge, path, says in (
        ("rule", data, "needs pairs"),
        ("phrases", other, "o.jsonl line 1: no labels"),
        ("rule", wrong, "w.jsonl line 1: 'winner' holds 'c'; known: a, b, tie"),
        ("gpt", data, "no classifier 'gpt'"),
    ):
        assert main(["eval-judge", judge, "--data", str(path), "--out", str(tmp_path / "o")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert says in error
