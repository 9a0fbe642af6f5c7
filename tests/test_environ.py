"""Variables for a while, by threads that overlap: what was there comes back, and nobody sees another's value."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from advgame.environ import variables

NAME, OTHER = "ADVGAME_TEST_ONE", "ADVGAME_TEST_TWO"


@pytest.fixture(autouse=True, params=[None, "old"])
def before(request, monkeypatch):
    monkeypatch.delenv(OTHER, raising=False)
    monkeypatch.delenv(NAME, raising=False)
    if request.param is not None:
        monkeypatch.setenv(NAME, request.param)
    return request.param


class Inside:
    """A thread within `variables`, until `leave`."""

    def __init__(self, **wanted):
        self.inside, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(wanted,), daemon=True)
        self._thread.start()

    def _run(self, wanted):
        with variables(wanted):
            self.inside.set()
            self._go.wait(20)

    def entered(self, seconds=5.0):
        return self.inside.wait(seconds)

    def leave(self):
        self._go.set()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in turn", "nested"])
def test_overlapping_uses_of_one_value_put_back_what_was_there(before, order):
    both = [Inside(**{NAME: "0"}), Inside(**{NAME: "0"})]
    assert all(one.entered() for one in both)
    both[order[0]].leave()
    assert os.environ[NAME] == "0"
    both[order[1]].leave()
    assert os.environ.get(NAME) == before


def test_another_value_waits_and_another_variable_does_not(before):
    first = Inside(**{NAME: "1"})
    assert first.entered()
    second = Inside(**{NAME: "2", OTHER: "2"})
    assert not second.entered(0.2)
    assert (os.environ[NAME], OTHER in os.environ) == ("1", False), "who waits holds nothing"
    third = Inside(**{OTHER: "3"})
    assert third.entered()
    first.leave()
    assert not second.entered(0.2)
    third.leave()
    assert second.entered()
    assert (os.environ[NAME], os.environ[OTHER]) == ("2", "2")
    second.leave()
    assert (os.environ.get(NAME), OTHER in os.environ) == (before, False)


def test_a_thread_may_want_another_value_inside_its_own(before):
    with variables({NAME: "1"}):
        with variables({NAME: "2"}), variables({NAME: "2"}):
            other = Inside(**{NAME: "2"})
            assert not other.entered(0.1), "it would see 1 later"
            assert os.environ[NAME] == "2"
        assert os.environ[NAME] == "1"
    assert other.entered()
    other.leave()
    assert os.environ.get(NAME) == before


def test_uses_of_one_thread_may_end_in_any_order(before):
    with ExitStack() as outer, ExitStack() as inner:
        outer.enter_context(variables({NAME: "1"}))
        inner.enter_context(variables({NAME: "2"}))
        outer.close()
        assert os.environ[NAME] == "2"
    assert os.environ.get(NAME) == before


def test_errors_leave_nothing_behind(before):
    with pytest.raises(ZeroDivisionError), variables({NAME: "1"}):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="null"), variables({NAME: "1", OTHER: "\0"}):
        pass
    assert (os.environ.get(NAME), OTHER in os.environ) == (before, False)
    other = Inside(**{NAME: "2"})
    assert other.entered()
    other.leave()


def test_many_threads(before):
    def one(i):
        with variables({NAME: str(i % 3), OTHER: str(i % 2)} if i % 5 else {OTHER: str(i % 2)}):
            time.sleep(0.001)
            seen = (os.environ.get(NAME), os.environ[OTHER])
        return seen[1] == str(i % 2) and (i % 5 == 0 or seen[0] == str(i % 3))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(300), timeout=60))
    assert (os.environ.get(NAME), OTHER in os.environ) == (before, False)


def test_a_fork_waits_for_no_thread_of_its_parent(before):
    """An engine's process is one, and joins groups itself."""
    held = Inside(**{NAME: "1"})
    assert held.entered()
    with variables({OTHER: "1"}):
        child = os.fork()
        if not child:
            code = 1
            try:
                with variables({NAME: "2", OTHER: "2"}):
                    code = 0 if os.environ[NAME] == "2" else 1
            finally:
                os._exit(code)
        deadline = time.monotonic() + 10
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
    held.leave()
    assert ended == (child, 0)
