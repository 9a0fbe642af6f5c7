"""A local OpenAI-compatible server in a thread: three models (attacker, target, judge) and every way to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """`trouble(model, number)` may name what goes wrong with the `number`-th request (from 0) to a model: a status,
    "stall", "hang up", bytes sent as the body, or None. Use as a context manager.
    """

    def __init__(self, trouble=lambda model, number: None, rating=lambda prompt: 4, delay=0.0):
        self.trouble, self.rating, self.delay = trouble, rating, delay
        self.seen, self.counts, self.lock = [], Counter(), threading.Lock()
        self.times = defaultdict(list)

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.answer(self, body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def spec(self, model, **options):
        base = {"timeout_s": 0.5, "retries": 3, "backoff_s": 0.01} | options
        words = "&".join(f"{name}={value}" for name, value in base.items())
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1#{model}?{words}"

    def answered(self, model):
        """The conversations that a model gave a good answer to."""
        return [json.dumps(turns) for name, turns in self.seen if name == model]

    def answer(self, handler, body):
        model, turns = body["model"], body["messages"]
        with self.lock:
            number = self.counts[model]
            self.counts[model] += 1
            self.times[model].append(time.perf_counter())
        time.sleep(self.delay)
        trouble = self.trouble(model, number)
        if trouble == "stall":
            time.sleep(1.0)
            return
        if trouble == "hang up":
            handler.close_connection = True
            return
        if isinstance(trouble, int):
            self.reply(handler, trouble, b'{"error": "no"}', {"Retry-After": "0.05"} if trouble == 429 else {})
            return
        if isinstance(trouble, bytes):
            self.reply(handler, 200, trouble)
            return
        text = self.text(model, turns)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(json.dumps(turns)), "completion_tokens": len(text)}
        with self.lock:
            self.seen.append((model, turns))
        self.reply(handler, 200, json.dumps({"choices": [choice], "usage": usage}).encode())

    def text(self, model, turns):
        last = turns[-1]["content"]
        if model == "attacker":
            # depends on the whole conversation, so that a changed history would show
            return json.dumps({"improvement": "kinder", "prompt": f"attempt {len(json.dumps(turns))}"})
        if model == "target":
            return f"sure, here is {last}"
        if "[[YES]]" in last:
            return "[[YES]]"
        if "<verdict>" in last:
            return "<verdict>true</verdict>"
        return f"Rating: [[{self.rating(last)}]]"

    def reply(self, handler, status, body, headers=None):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
