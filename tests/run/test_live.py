"""The live view: plain lines without a terminal, a table with one, and a terminal left as it was found."""

import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from advgame.run import names
from advgame.run.live import LiveView, Stage

STEP = {
    names.STEP_SECONDS: 2.0,
    names.stage_seconds("play"): 1.25,
    names.TREES_PER_SECOND: 40.0,
    names.reward("harmful", "attacker"): 3.5,
    names.ASR: 0.25,
    names.loss("defender"): 0.6931,
    names.HIDDEN_SECONDS: 0.5,
    names.TREES_PER_HOUR: 1234.0,
    names.engine_seconds("judge"): 1.5,
    names.JUDGE_SHARE: 0.61,
    names.STALENESS: 1.0,
    "count/defender_failures": 2.0,
    "count/attacker_failures": 0.0,
}


def plain():
    return Console(file=io.StringIO(), width=100)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120, height=30)


def test_lines_without_a_terminal(tmp_path):
    console, log = plain(), tmp_path / "log.txt"
    with LiveView(25, True, every=10, log=log, console=console) as view:
        for step in range(25):
            view.update(step, STEP)
        view.note("saved [a/b] here")
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["10/25", "20/25", "25/25"]
    for part in (
        "eta 0:00",
        "s/step 2.00",
        "play 1.25",
        "hidden 0.50",
        "trees/h 1234",
        "judge 61%",
        "stale 1.00",
        "A harmful 3.50",
        "asr 0.25",
        "defender_failures 2",
    ):
        assert part in lines[2]
    assert "attacker_failures" not in lines[2], "a counter at zero is not shown"
    assert lines[-1] == "saved [a/b] here", "brackets are not markup"
    assert "\x1b" not in console.file.getvalue()
    assert [line.split(" ", 1)[1] for line in log.read_text().splitlines()] == lines


def test_disabled_prints_nothing_but_logs(tmp_path):
    for console in (plain(), terminal()):
        with LiveView(1, False, log=tmp_path / "log.txt", console=console) as view:
            view.update(0, STEP)
            view.note("hello")
        with Stage("warm start", {"attacker": 4}, False, console=console) as stage:
            stage.update("attacker", 4)
        assert console.file.getvalue() == ""
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def test_rare_values_stay_and_step_values_do_not():
    console = plain()
    with LiveView(2, True, every=1, console=console) as view:
        view.update(0, {**STEP, names.EXPLOITABILITY: 0.8125})
        view.update(1, {names.STEP_SECONDS: 3.0})
    last = console.file.getvalue().splitlines()[-1]
    assert "exploit 0.812" in last
    assert "defender_failures 2" in last
    assert "asr" not in last
    assert "play" not in last


def test_table_at_a_terminal():
    console = terminal()
    with LiveView(10, True, console=console) as view:
        view.update(0, {**STEP, names.EXPLOITABILITY: 0.5})
        view.note("checkpoint written")
    text = console.file.getvalue()
    for part in ("1/10", "Attacker", "Defender", "0.6931", "trees/s", "exploitability 0.500", "defender_failures 2"):
        assert part in text
    for part in ("hidden 0.50", "1234 trees/h", "judge 1.50 s", "judge's share 61%", "staleness 1.00"):
        assert part in text
    assert "checkpoint written" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_cursor_comes_back_after_an_error(error):
    for make in (lambda c: LiveView(3, True, console=c), lambda c: Stage("warm start", {"a": 2}, True, console=c)):
        console = terminal()
        with pytest.raises(error), make(console) as view:  # noqa: PT012
            view.update("a", 1) if isinstance(view, Stage) else view.update(0, STEP)
            raise error
        text = console.file.getvalue()
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown after it was hidden"
        assert console._live_stack == [], "no display is left running"


def test_ctrl_c_on_a_real_terminal():
    code = (
        "import time\nfrom advgame.run.live import LiveView\n"
        "with LiveView(100, True) as view:\n"
        "    for step in range(100):\n        view.update(step, {}); time.sleep(0.05)\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    try:
        sent = False
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # the terminal's other end is closed: the process has ended
                break
            text += chunk
            if b"steps" in text and not sent:
                process.send_signal(signal.SIGINT)
                sent = True
            if not chunk:
                break
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert sent
    assert b"KeyboardInterrupt" in text
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")


def test_stage_bars_and_lines():
    console = plain()
    with Stage("warm start", {"attacker": 8, "defender": 4}, True, console=console) as stage:
        for done in range(1, 9):
            stage.update("attacker", done, loss=1.23456)
        stage.update("defender", 4)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "warm start: attacker 2/8  loss 1.23"
    assert lines[-1] == "warm start: defender 4/4"
    assert len(lines) == 5
    console = terminal()
    with Stage("warm start", {"attacker": 8, "defender": 4}, True, console=console) as stage:
        stage.update("attacker", 5, loss=0.5)
    assert "warm start: attacker" in console.file.getvalue()
    assert "5/8" in console.file.getvalue()
