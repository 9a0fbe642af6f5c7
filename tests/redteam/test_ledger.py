"""The ledger and the budget: what is paid once is never paid again, and a run stops cleanly where it must."""

import asyncio
import json

import pytest
from scripted import SEED, Scripted, Table, proposal
from test_strategies import echo, judge, numbered

from advgame.errors import InputError
from advgame.redteam.budget import Budget, BudgetSpent, QueryFailed, Stopped
from advgame.redteam.records import FAILURES_IN_A_ROW, Ledger, Voice
from advgame.redteam.strategies import Fate, Stop, pair_settings, tap_settings
from advgame.rollout.engine import EngineError, Sampling

HOW = Sampling(0.0, 1.0, 10)


def lines(folder):
    return [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]


def by_content(turns):
    """An attacker whose next prompt depends on the whole conversation, as a real one's does."""
    return proposal(f"p{len(json.dumps(turns))}")


def asked(folder, *requests, script=echo, budget=None, role="target"):
    """Answers of a fresh ledger in `folder` to (key, text) requests, and the model's log."""
    log = []
    ledger = Ledger(folder / "queries.jsonl", budget or Budget(), 0, "a test")
    voice = Voice(role, Scripted("m", script, log), HOW)

    async def run():
        with ledger:
            return [await ledger.ask(voice, key, [("user", text)]) for key, text in requests]

    return asyncio.run(run()), log, ledger


def test_a_line_says_who_was_asked_what_and_what_came_back(tmp_path):
    asked(tmp_path, ("a/s:1/1.0", "hello"))
    notice, line = lines(tmp_path)
    assert "controlled artifact" in notice["notice"]
    assert notice["purpose"] == "a test"
    line.pop("time"), line.pop("seconds"), line.pop("fingerprint")
    assert line == {
        "key": "a/s:1/1.0/target", "role": "target", "model": "m", "sampling": [0.0, 1.0, 10],
        "turns": [["user", "hello"]], "status": "ok", "text": "answer to hello", "finish": "stop",
        "prompt_tokens": 1, "completion_tokens": 3,
    }  # fmt: skip


def test_what_was_paid_for_is_not_asked_again(tmp_path):
    (first, _), _, _ = asked(tmp_path, ("a", "x"), ("b", "x"))
    (again, _), log, ledger = asked(tmp_path, ("a", "x"), ("b", "x"))
    assert (again, log) == (first, [])
    assert ledger.counters["target_replayed"] == 2
    assert (ledger.budget.queries, ledger.budget.tokens) == (2, 8)  # paid is paid: an earlier start's spending counts


@pytest.mark.parametrize("change", ["key", "text", "sampling", "model"])
def test_another_question_is_asked(tmp_path, change):
    asked(tmp_path, ("a", "x"))
    log = []
    ledger = Ledger(tmp_path / "queries.jsonl", Budget(), 0, "a test")
    how = Sampling(0.5, 1.0, 10) if change == "sampling" else HOW
    voice = Voice("target", Scripted("other" if change == "model" else "m", echo, log), how)

    async def run():
        with ledger:
            key, text = "b" if change == "key" else "a", "y" if change == "text" else "x"
            await ledger.ask(voice, key, [("user", text)])

    asyncio.run(run())
    assert len(log) == 1


def test_a_refusal_for_good_is_remembered_and_a_failure_is_not(tmp_path):
    (answer,), _, _ = asked(tmp_path, ("a", "x"), script=lambda _: ...)
    assert answer is None
    assert asked(tmp_path, ("a", "x"))[1] == []
    with pytest.raises(QueryFailed):
        asked(tmp_path, ("b", "x"), script=lambda _: None)
    (answer,), log, ledger = asked(tmp_path, ("b", "x"))
    assert answer.text == "answer to x"
    assert len(log) == 1
    assert ledger.counters["failed_before"] == 1
    assert [line["status"] for line in lines(tmp_path)[1:]] == ["rejected", "failed", "ok"]


def test_a_torn_last_line_is_one_query_lost(tmp_path):
    asked(tmp_path, ("a", "x"), ("b", "y"))
    path = tmp_path / "queries.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    _, log, ledger = asked(tmp_path, ("a", "x"), ("b", "y"))
    assert log == [("m", [("user", "y")])]
    assert ledger.counters["torn_lines"] == 1
    assert len(lines(tmp_path)) == 3


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    asked(tmp_path, ("a", "x"), ("b", "y"))
    path = tmp_path / "queries.jsonl"
    path.write_text(path.read_text().replace('"key"', "key", 1))
    with pytest.raises(InputError, match=r"queries\.jsonl line 2: no record"):
        asked(tmp_path)


def test_a_model_that_is_down_ends_the_run(tmp_path):
    log = []
    ledger = Ledger(tmp_path / "queries.jsonl", Budget(), 0, "a test")
    voice = Voice("target", Scripted("m", lambda _: None, log), HOW)

    async def run():
        with ledger:
            for i in range(FAILURES_IN_A_ROW - 1):
                with pytest.raises(QueryFailed):
                    await ledger.ask(voice, str(i), [("user", "x")])
            await ledger.ask(voice, "last", [("user", "x")])

    with pytest.raises(EngineError, match="failed 12 times in a row"):
        asyncio.run(run())


def test_the_budget_of_queries_is_exact_and_a_bigger_one_goes_on(tmp_path):
    scripts = {"attacker": by_content, "target": echo, "judge": judge({})}
    table = Table(tmp_path, budget=Budget(max_queries=5), **scripts)
    attempt = table.search(tap_settings(depth=3, branching=2, width=2))
    assert isinstance(table.halt, BudgetSpent)
    assert attempt.stop is Stop.UNFINISHED
    assert len(table.asked("target")) == table.budget.queries == 5
    assert len([c for c in attempt.candidates if c.response is not None]) == 5
    more = Table(tmp_path, budget=Budget(max_queries=100), **scripts)
    finished = more.search(tap_settings(depth=3, branching=2, width=2))
    assert finished.stop is Stop.EXHAUSTED
    assert len(more.asked("target")) == 10 - 5
    (tmp_path / "whole").mkdir()
    whole = Table(tmp_path / "whole", **scripts)
    assert whole.search(tap_settings(depth=3, branching=2, width=2)).candidates == finished.candidates


def test_the_budget_of_tokens(tmp_path):
    table = Table(tmp_path, budget=Budget(max_tokens=30), attacker=numbered(), target=echo, judge=judge({}))
    attempt = table.search(pair_settings(1, 50, 4))
    assert isinstance(table.halt, BudgetSpent)
    assert 30 <= table.budget.tokens < 50  # by as much as one query was in flight
    assert attempt.queries >= 1


def test_a_stop_asks_nothing_more_but_keeps_what_arrives(tmp_path):
    budget = Budget()

    def target(turns):
        budget.stopping = True
        return echo(turns)

    table = Table(tmp_path, budget=budget, attacker=numbered(), target=target, judge=judge({}))
    attempt = table.search(pair_settings(2, 3, 4))
    assert isinstance(table.halt, Stopped)
    assert [c.fate for c in attempt.candidates].count(Fate.UNJUDGED) == len(table.asked("target")) > 0
    assert table.asked("judge") == []


@pytest.mark.parametrize("kind", ["pair", "tap"])
def test_killed_after_any_query_a_run_goes_on_and_repeats_nothing(tmp_path, kind):
    """A process that dies after its n-th query, for every n: the sum of all queries is that of a whole run."""
    settings = pair_settings(2, 3, 2) if kind == "pair" else tap_settings(depth=3, branching=2, width=2, keep_last=1)
    ratings = judge({})
    (tmp_path / "whole").mkdir()
    whole = Table(tmp_path / "whole", attacker=by_content, target=echo, judge=ratings)
    expected = whole.search(settings)
    total = len(whole.log)
    for after in range(1, total):
        folder = tmp_path / str(after)
        folder.mkdir()
        count = [0]

        def dying(script, count=count, after=after):
            def answer(turns):
                count[0] += 1
                if count[0] > after:
                    raise KeyboardInterrupt
                return script(turns)

            return answer

        first = Table(folder, attacker=dying(by_content), target=dying(echo), judge=dying(ratings))
        first.search(settings)
        second = Table(folder, attacker=by_content, target=echo, judge=ratings)
        got = second.search(settings)
        assert got.candidates == expected.candidates
        answered = len(lines(folder)) - 1
        assert answered == total
        assert after + len(second.log) == total


def test_keys_name_the_seed_and_the_place(tmp_path):
    table = Table(tmp_path, attacker=numbered(), target=echo, judge=judge({}))
    table.search(tap_settings(depth=1, branching=1))
    keys = [line["key"] for line in lines(tmp_path)[1:]]
    assert keys == [f"test/{SEED.id}/1.0/{rest}" for rest in ("try0/attacker", "topic", "target", "judge")]
