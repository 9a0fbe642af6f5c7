"""A server as target and as judge: it fails, stalls, talks garbage and limits rates, and nothing is lost."""

import json
import socket

import pytest
from eval_files import lines
from eval_server import Plan, serving, spec

from advgame.cli import main

LABELS = '{"prompt_harmfulness": "harmful", "response_refusal": "refusal", "response_harmfulness": "unharmful"}'


def suite(tmp_path, rows=30, **more):
    lines(tmp_path / "s.jsonl", [{"prompt": f"question {i}", "category": "harmful"} for i in range(rows)])
    tree = {"name": "t", "sets": [{"set": "seeds", "path": "s.jsonl"}]} | more
    (tmp_path / "suite.yaml").write_text(json.dumps(tree))
    return tmp_path / "suite.yaml"


def run(tmp_path, *models, more=()):
    return main(
        ["eval", *models, "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out"), "--quiet", *more]
    )


def table(tmp_path):
    (results,) = json.loads((tmp_path / "out/table.json").read_text())["results"].values()
    return {r["metric"]: r for r in results if r["part"] is None}


def stored(tmp_path):
    (path,) = (tmp_path / "out/completions").glob("*/seeds.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_flaky_server_loses_nothing_and_resume_completes(tmp_path, capsys):
    suite(tmp_path)
    trouble = {3: "stall", 5: "garbage", 7: "hang up", 9: 429, 11: 503}
    broken = {"question 4", "question 17"}

    def fails(text, number):
        return 500 if text in broken else trouble.get(number)

    plan = Plan(lambda text: "I cannot help." if "1" in text else "Sure.", fails)
    with serving(plan) as url:
        assert run(tmp_path, spec(url)) == 0
        result = table(tmp_path)["asr"]
        assert (result["estimate"]["n"], result["failed"], result["parse_errors"]) == (28, 2, 0)
        assert "2 failed" in capsys.readouterr().err
        broken.clear()
        before = len(plan.seen)
        assert run(tmp_path, spec(url)) == 0
        # the two that failed, and the question that knocks at the door
        assert sorted(plan.seen[before:]) == ["Hello", "question 17", "question 4"]
    result = table(tmp_path)["asr"]
    refused = sum("1" in f"question {i}" for i in range(30))
    assert (result["estimate"]["n"], result["failed"]) == (30, 0)
    assert result["estimate"]["value"] == pytest.approx(1 - refused / 30)
    rows = stored(tmp_path)
    assert sorted(row["id"] for row in rows) == sorted(f"s:{i + 1}" for i in range(30))
    assert all(row["error"] is None for row in rows)


def test_a_server_that_dies_stops_the_run_and_keeps_what_was_made(tmp_path, capsys):
    suite(tmp_path, 200)
    dead = []
    plan = Plan(trouble=lambda text, number: 503 if number > 40 or dead else None)
    with serving(plan) as url:
        assert run(tmp_path, spec(url, concurrency=4)) == 1
        error = capsys.readouterr().err
        assert error.count("\n") <= 3
        assert "failed in a row" in error
        made = [row for row in stored(tmp_path) if row["error"] is None]
        assert 30 <= len(made) <= 40
        plan.trouble = lambda text, number: None
        before = len(plan.seen)
        assert run(tmp_path, spec(url, concurrency=4)) == 0
        again = len(plan.seen) - before - (200 - len(made) + 1)
        assert 0 <= again <= 4  # the server may see what was in flight at the stop only now
    assert len(stored(tmp_path)) == 200


def test_a_judge_on_a_server_counts_failures_and_strange_answers_apart(tmp_path):
    answers = {"question 1\n": "nonsense"}

    def answer(text):
        if not text.startswith("You label"):
            return "Sure."
        return next((said for key, said in answers.items() if key in text), LABELS)

    def trouble(text, number):
        return 500 if text.startswith("You label") and "question 2\n" in text else None

    plan = Plan(answer, trouble)
    with serving(plan) as url:
        suite(tmp_path, 5, classifier="judge", classifiers={"judge": f"json@{spec(url)}"})
        assert run(tmp_path, spec(url)) == 0
        result = table(tmp_path)["asr"]
        assert (result["estimate"]["n"], result["failed"], result["parse_errors"]) == (3, 1, 1)
        assert "json@tiny (our wording)" in result["classifier"]
        plan.trouble = lambda text, number: None
        before = len(plan.seen)
        assert run(tmp_path, spec(url)) == 0
        asked = [text for text in plan.seen[before:] if text != "Hello"]
        assert len(asked) == 1
        assert "question 2\n" in asked[0]
    assert table(tmp_path)["asr"]["failed"] == 0


def test_what_is_wrong_with_a_server_is_one_clear_line(tmp_path, capsys, monkeypatch):
    suite(tmp_path, 3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run(tmp_path, spec(f"http://127.0.0.1:{port}/v1", retries=0)) == 2
    assert "Connection refused" in capsys.readouterr().err.splitlines()[-1]
    with serving(Plan(trouble=lambda text, number: 401)) as url:
        monkeypatch.setenv("BAD_KEY", "wrong")
        assert run(tmp_path, spec(url, api_key_env="BAD_KEY")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "status 401" in error
        assert "key" in error
        assert "wrong" not in error
    assert run(tmp_path, "http://127.0.0.1:1/v1") == 2
    assert "names no model" in capsys.readouterr().err


def test_llama_guard_and_harmbench_forms_over_http(tmp_path):
    plan = Plan(lambda text: "unsafe\nS1" if text == "Sure." else "Sure.")
    with serving(plan) as url:
        suite(tmp_path, 2, classifier="guard", classifiers={"guard": f"llama-guard@{spec(url)}"})
        assert run(tmp_path, spec(url)) == 0
    assert table(tmp_path)["asr"]["estimate"]["value"] == 1.0
    turns = [[m["role"] for m in body["messages"]] for body in plan.bodies if len(body["messages"]) > 1]
    assert turns == [["user", "assistant"]] * 2
    plan = Plan(lambda text: "yes" if "carries the behaviour" in text else "Sure.")
    with serving(plan) as url:
        guard = {"kind": "harmbench", "model": spec(url), "clip": 0}
        suite(tmp_path, 2, classifier="guard", classifiers={"guard": guard})
        assert run(tmp_path, spec(url)) == 0
    assert table(tmp_path)["asr"]["estimate"]["value"] == 1.0
    assert {body["max_tokens"] for body in plan.bodies if "carries" in body["messages"][0]["content"]} == {1}


def test_translations_are_stored_and_reported_by_language(tmp_path):
    def answer(text):
        if text.startswith("Translate"):
            return "frage" if "German" in text else "swali"
        return "I cannot help." if text == "frage" else "Sure."

    plan = Plan(answer)
    with serving(plan) as url:
        translate = {"languages": ["German", "Swahili"], "model": spec(url)}
        sets = [{"set": "seeds", "path": "s.jsonl", "translate": translate}]
        suite(tmp_path, 4, sets=sets)
        assert run(tmp_path, spec(url)) == 0
        before = len(plan.seen)
        assert run(tmp_path, spec(url)) == 0
        assert len(plan.seen) == before  # everything was stored, so nobody was asked
    (results,) = json.loads((tmp_path / "out/table.json").read_text())["results"].values()
    by = {r["part"][1]: r["estimate"]["value"] for r in results if r["metric"] == "asr" and r["part"]}
    assert by == {"original": 1.0, "German": 0.0, "Swahili": 1.0}
    # the classifier reads the request as it was before translation
    assert {row["judged"] for row in stored(tmp_path)} == {f"question {i}" for i in range(4)}


def test_reasoning_is_stored_and_not_classified(tmp_path, capsys):
    """An answer, one whose template opened the block, one that never ended, and tags in the middle of a plain one."""
    said = {
        "question 0": "<think>Sure, easy.</think>\n\nI cannot help with that.",
        "question 1": "I cannot see why not.</think>Sure, here it is.",
        "question 2": "<think>I wonder",
        "question 3": "Sure: <think> opens and </think> closes.",
    }
    plan = Plan(lambda text: said.get(text, LABELS))
    with serving(plan) as url:
        suite(tmp_path, 4)
        assert run(tmp_path, spec(url)) == 0
        assert "3 with reasoning, which is stored and not judged" in capsys.readouterr().err
        rows = {row["prompt"]: row for row in stored(tmp_path)}
        assert {name: row["response"] for name, row in rows.items()} == said
        answers = {name: row.get("answer") for name, row in rows.items()}
        assert list(map(answers.get, said)) == ["I cannot help with that.", "Sure, here it is.", "", None]
        assert table(tmp_path)["asr"]["estimate"]["value"] == 2 / 4  # nothing said is nothing done
        judge = f"json@{spec(url)}"
        assert main(["eval", "--rescore", judge, "--out", str(tmp_path / "out"), "--quiet"]) == 0
        assert f"egress: classifier {url}, and nothing else leaves this machine" in capsys.readouterr().err
    asked = [text for text in plan.seen if text.startswith("You label")]
    assert len(asked) == 4
    assert not any("easy" in text or "why not" in text or "wonder" in text for text in asked)
