"""Real runs in processes of their own: keys stay in the environment, nothing leaves the machine or can be reached."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import engines
import pytest
from defender_runs import SHORT, config_file

from bench import traces

KEYS = {
    name: f"{name.lower()}-{os.urandom(8).hex()}"
    for name in ("JUDGE_KEY", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "OPENAI_API_KEY")
}

WATCH = '''
"""Runs before everything else: writes down, and forbids, whatever would leave this machine."""
import ipaddress, os, sys

def here(host):
    if not host or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not here(host):
        with open(os.environ["EGRESS_LOG"], "a") as log:
            log.write(f"{event} {host} {sys.argv}\\n")
        raise OSError(f"{event} {host}: forbidden")

sys.addaudithook(watch)
'''


@pytest.fixture
def words(tmp_path):
    """A run of a Defender on seeds as they are, and the environment of a process that is watched."""
    run = {"root": str(tmp_path), "name": "a", "purpose": "a test", "steps": 3, "checkpoint_every": 2}
    config = config_file(
        tmp_path,
        engines.folder(tmp_path / "player"),
        SHORT,
        run=run | {"validate_every": 2, "threads": 1},
        data={"harmful": 2, "benign": 2, "validation_limit": 8},
        max_tokens=24,
        rollout={"vllm": {"max_model_len": 256, "cache_gib": 0.25}},
    )
    return ["train", str(config)]


@pytest.fixture
def watched(tmp_path):
    """(environment of a process that is watched, where it writes what it tried)."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    root = Path(__file__).parents[2]
    log = tmp_path / "egress.txt"
    paths = [tmp_path / "watch", root, root / "kernels"]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "EGRESS_LOG": str(log), "OMP_NUM_THREADS": "1"}
    return {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | own, log


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that repeats the key it was given when it fails, as some do."""

    seen: list[str | None]

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        type(self).seen.append(self.headers["authorization"])
        said = "<score_A>7</score_A> <score_B>4</score_B>"
        body, status = {"choices": [{"finish_reason": "stop", "message": {"content": said}}]}, 200
        if len(type(self).seen) % 3 == 0:
            status = (500, 400)[len(type(self).seen) % 2]
            body = {"error": f"no access for {self.headers['authorization']}"}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    Judge.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def advgame(words, environment):
    return subprocess.run(
        [sys.executable, "-m", "advgame.cli", *map(str, words)], env=environment, capture_output=True, timeout=300
    )


@pytest.mark.slow
def test_keys_of_the_environment_are_in_no_file_and_no_line(words, watched, tmp_path):
    environment, _ = watched
    with serving() as url:
        endpoint = f"{{url: {url}, model: m, api_key_env: JUDGE_KEY, retries: 1, backoff_s: 0}}"
        made = advgame([*words, "--judge.kind", "llm", "--judge.endpoint", endpoint], environment | KEYS)
        assert made.returncode == 0, made.stderr
    assert set(Judge.seen) == {f"Bearer {KEYS['JUDGE_KEY']}"}
    page = advgame(["report", tmp_path / "a", "--out", tmp_path / "a" / "page.html"], environment | KEYS)
    assert page.returncode == 0, page.stderr
    said = {"the output": made.stdout + made.stderr + page.stdout + page.stderr}
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            said[str(path)] = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert len(said) > 15
    assert "JUDGE_KEY" in (tmp_path / "a" / "config.yaml").read_text()  # the name is recorded, the key is not
    assert [(where, name) for where, text in said.items() for name, key in KEYS.items() if key.encode() in text] == []


def test_a_key_that_a_server_repeats_is_masked(monkeypatch):
    """In the words of the error that ends a red-teaming or an evaluation, too."""
    import asyncio

    from advgame.rollout.endpoint_engine import client_of
    from advgame.rollout.engine import EngineError
    from advgame.rollout.settings import EndpointSettings

    monkeypatch.setenv("JUDGE_KEY", KEYS["JUDGE_KEY"])

    async def said(url):
        client = client_of(EndpointSettings(url=url, model="m", api_key_env="JUDGE_KEY", retries=0), "judge")
        texts = []
        for _ in range(6):
            try:
                await client.post("/chat/completions", {})
            except EngineError as error:
                texts.append(str(error))
        client.close()
        return texts

    with serving() as url:
        texts = asyncio.run(said(url))
    assert len(texts) == 2
    for text in texts:
        assert "no access for Bearer ***" in text
        assert KEYS["JUDGE_KEY"] not in text


@pytest.mark.slow
def test_a_run_sends_nothing_anywhere(words, watched, tmp_path):
    environment, log = watched
    made = advgame([*words, "--quiet"], environment)
    assert made.returncode == 0, made.stderr
    assert not log.exists(), log.read_text()
    # and the watch does see what leaves
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 1
    assert "socket.getaddrinfo 192.0.2.1" in log.read_text()


def test_the_store_of_collective_publishing_listens_on_loopback_alone():
    from advgame.publish.group import open_store

    store = open_store("127.0.0.1", 0)  # the process's own, which an earlier test may have opened
    store.set("a", "b")
    assert store.get("a") == b"b"
    listening = traces.listeners([os.getpid()])
    assert {place for place in listening if place[1] == store.port} == {("127.0.0.1", store.port)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_engines_listen_on_loopback_alone_and_send_nothing(words, watched, tmp_path):
    pytest.importorskip("vllm")
    environment, log = watched
    more = ["--quiet", "--rollout.engine", "vllm", "--rollout.vllm.replicas", "{defender: 2}", "--run.steps", "100000"]
    out = (tmp_path / "out.txt").open("wb")
    run = subprocess.Popen(
        [sys.executable, "-m", "advgame.cli", *words, *more], env=environment, start_new_session=True,
        stdout=out, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        give_up = time.monotonic() + 300
        while not (tmp_path / "a" / "trees" / "000003.jsonl.gz").exists():
            assert run.poll() is None, (tmp_path / "out.txt").read_text()[-3000:]
            assert time.monotonic() < give_up
            time.sleep(0.1)
        family = traces.run_processes("none", run.pid)
        assert len(family) >= 3  # the trainer and two engines
        listening = traces.listeners([one.pid for one in family])
    finally:
        for one in traces.run_processes("none", run.pid):
            traces.end([one])
        run.wait()
        out.close()
    assert not log.exists(), log.read_text()
    assert [place for place in listening if not place[0].startswith("127.") and place[0] != "::1"] == []
