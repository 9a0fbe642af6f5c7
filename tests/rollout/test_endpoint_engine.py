"""Endpoints against a real local server that answers, stalls, drips, fails, limits rates and talks nonsense."""

import asyncio
import json
import time
from collections import Counter

import engines
import pytest

from advgame.errors import InputError
from advgame.rollout.endpoint_engine import EndpointEngine, EndpointSpeaker, check_endpoint, text_of
from advgame.rollout.engine import EngineError, Sampling
from advgame.rollout.settings import EndpointSettings


class Server:
    """Plays `script`, one behaviour a request, then answers well; keeps every request it saw."""

    def __init__(self, *script):
        self.script = list(script)
        self.seen = []
        self.most = self.now = 0
        self.connections = 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.seen.append((lines[0].split()[1], headers, body))
                self.now += 1
                self.most = max(self.most, self.now)
                behaviour = self.script.pop(0) if self.script else "good"
                await self.behave(behaviour, body, writer)
                self.now -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def behave(self, behaviour, body, writer):
        if behaviour == "stall":
            await asyncio.sleep(30)
        elif behaviour == "drip":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif behaviour == "hang up":
            raise ConnectionError
        elif behaviour == "slow":
            await asyncio.sleep(0.1)
            self.reply(writer, 200, self.answer(body))
        elif behaviour == "good":
            self.reply(writer, 200, self.answer(body))
        elif behaviour == "good, then closes":
            self.reply(writer, 200, self.answer(body))
            await writer.drain()
            raise ConnectionError
        elif isinstance(behaviour, bytes):
            self.reply(writer, 200, behaviour)
        else:
            self.reply(writer, behaviour, b'{"error": "no"}', "Retry-After: 0.2\r\n" if behaviour == 429 else "")

    def answer(self, body):
        choice = {"finish_reason": "stop", "text": " hello ", "message": {"role": "assistant", "content": " hello "}}
        if body.get("return_token_ids"):
            choice |= {"token_ids": [5, 2], "logprobs": {"token_logprobs": [-0.5, -1.0]}}
        return json.dumps({"choices": [choice], "usage": {"completion_tokens": 2}}).encode()

    def reply(self, writer, status, body, more=""):
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)


def settings(server, **changes):
    base = {"url": f"http://127.0.0.1:{server.port}/v1", "model": "m", "timeout_s": 0.4, "retries": 2}
    return EndpointSettings(**(base | {"backoff_s": 0.01} | changes))


def asked(*script, times=1, **changes):
    """(answers, server, counters, seconds) of a speaker that asks a server with this script."""

    async def run():
        async with Server(*script) as server:
            counters = Counter()
            speaker = EndpointSpeaker("judge", settings(server, **changes), Sampling(0.6, 0.9, 32), 3, counters)
            start = time.perf_counter()
            answers = await asyncio.gather(*(speaker.ask("who wins?", (0, i)) for i in range(times)))
            seconds = time.perf_counter() - start
            await speaker.close()
            return answers, server, counters, seconds

    return asyncio.run(run())


def test_a_chat_question_and_its_answer():
    ((sample, text),), server, counters, _ = asked()
    assert (sample.finish_reason, sample.finished, text) == ("stop", True, "hello")
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "who wins?"}]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.6, 0.9, 32)
    assert 0 <= body["seed"] < 2**31
    assert "authorization" not in headers
    assert counters == {"judge_requests": 1, "judge_tokens": 2}


def test_a_verdict_ends_the_answer_though_no_stop_is_sent():
    long = {"finish_reason": "length", "message": {"content": "so <score_B>2</score_B> and then"}}
    usage = {"completion_tokens": 9, "prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}

    async def run(stop):
        async with Server(json.dumps({"choices": [long], "usage": usage}).encode()) as server:
            speaker = EndpointSpeaker("judge", settings(server), Sampling(), 3)
            sample, text = await speaker.ask("who wins?", (0,), stop=stop)
            await speaker.close()
            assert "stop" not in server.seen[0][2]
            return sample.finish_reason, text, speaker.counters

    reason, text, counters = asyncio.run(run(("</score_B>",)))
    assert (reason, text) == ("stop", "so <score_B>2</score_B>")
    assert (counters["judge_prompt_tokens"], counters["judge_cached_tokens"]) == (40, 32)
    assert asyncio.run(run(("</verdict>",)))[:2] == ("length", "so <score_B>2</score_B> and then")


def test_completions_send_plain_text():
    ((_, text),), server, _, _ = asked(api="completions")
    assert text == "hello"
    assert server.seen[0][0] == "/v1/completions"
    assert server.seen[0][2]["prompt"] == "who wins?"


def test_seeds_differ_by_key_and_repeat():
    def seeds():
        return sorted(body["seed"] for _, _, body in asked(times=3)[1].seen)

    assert len(set(seeds())) == 3
    assert seeds() == seeds()


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    server = asked(api_key_env="JUDGE_KEY")[1]
    assert server.seen[0][1]["authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    ("behaviour", "counter"),
    [("stall", "judge_http_timeouts"), ("drip", "judge_http_timeouts"), ("hang up", None), (500, "judge_http_500"),
     (429, "judge_http_429"), (b"<html>", None)],
    ids=str,
)  # fmt: skip
def test_what_may_pass_is_tried_again(behaviour, counter):
    ((sample, text),), _, counters, seconds = asked(behaviour)
    assert (sample.finish_reason, text) == ("stop", "hello")
    assert counters["judge_http_retries"] == 1
    assert counter is None or counters[counter] == 1
    assert seconds < 3
    if behaviour == 429:
        assert seconds >= 0.2  # Retry-After is obeyed


@pytest.mark.parametrize("behaviour", ["stall", 503, "hang up", b"[1, 2"], ids=str)
def test_a_server_that_never_recovers_is_given_up_within_its_limits(behaviour):
    ((sample, text),), _, counters, seconds = asked(*[behaviour] * 9)
    assert (sample, text) == (None, "")
    assert (counters["judge_given_up"], counters["judge_http_retries"]) == (1, 2)
    assert seconds < 4


@pytest.mark.parametrize(
    "behaviour",
    [404, 401, b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": {}}]}', b"7"],
    ids=str,
)
def test_what_will_not_pass_is_not_tried_again(behaviour):
    ((sample, text),), server, counters, _ = asked(behaviour)
    assert (sample, text) == (None, "")
    assert counters["judge_given_up"] == 1
    assert len(server.seen) == 1


def test_no_more_requests_at_once_than_allowed():
    answers, server, _, seconds = asked(*["slow"] * 12, times=12, concurrency=3)
    assert all(text == "hello" for _, text in answers)
    assert server.most == 3
    assert seconds < 2


def test_a_connection_that_the_server_closed_while_idle_is_no_failure():
    async def run():
        async with Server("good, then closes") as server:
            counters = Counter()
            speaker = EndpointSpeaker("judge", settings(server, concurrency=1), Sampling(), 0, counters)
            for i in range(3):
                assert (await speaker.ask("a", (i,)))[1] == "hello"
                await asyncio.sleep(0.05)
            await speaker.close()
            return server, counters

    server, counters = asyncio.run(run())
    assert counters["judge_http_retries"] == 0
    assert server.connections == 2  # one closed by the server, one kept


def test_the_engine_speaks_token_ids():
    async def run(*script):
        async with Server(*script) as server:
            engine = EndpointEngine("attacker", settings(server))
            try:
                return await engine.generate(engines.request((3, 4))), server
            finally:
                await engine.close()

    sample, server = asyncio.run(run())
    assert (sample.prompt_ids, sample.token_ids, sample.logprobs, sample.version) == ((3, 4), (5, 2), (-0.5, -1.0), 0)
    assert server.seen[0][2]["prompt"] == [3, 4]
    with pytest.raises(EngineError, match="no token ids"):
        asyncio.run(run(b'{"choices": [{"text": "x", "finish_reason": "stop"}]}'))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"url": "localhost:8000"}, r"judge\.endpoint\.url: .* write http://host:port/v1"),
        ({"url": "http://me:secret@host/v1"}, r"judge\.endpoint\.url: no user or password"),
        ({"api_key_env": "NOT_SET_HERE"}, r"judge\.endpoint\.api_key_env: .* NOT_SET_HERE is not set; export it"),
    ],
)
def test_bad_settings_are_named_before_anything_is_sent(changes, says):
    with pytest.raises(InputError, match=says) as caught:
        check_endpoint(EndpointSettings(**({"url": "http://h/v1", "model": "m"} | changes)), "judge.endpoint")
    assert "secret" not in str(caught.value)


def test_the_host_is_what_is_printed():
    assert check_endpoint(EndpointSettings(url="https://judge.example:8443/v1", model="m"), "x") == "judge.example:8443"


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"message": {"content": "hello"}}, "hello"),
        ({"message": {"content": None}, "finish_reason": "length"}, ""),  # cut off before the answer began
        ({"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "stop"}, ""),
        ({"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}, "I will not."),
        ({"message": {"content": None}, "finish_reason": "stop"}, None),
        ({"message": {"content": 3}}, None),
        ({"message": {}}, None),
        ({"message": "hello"}, None),
        ({}, None),
    ],
)
def test_what_a_choice_says(choice, says):
    if says is None:
        with pytest.raises(EngineError, match="m: the answer has no text"):
            text_of(choice, True, "m")
    else:
        assert text_of(choice, True, "m") == says
