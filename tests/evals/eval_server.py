"""A real OpenAI-compatible server in a thread, which answers by rule and misbehaves by plan."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Plan:
    """`answer(text)` gives the answer to a prompt; `trouble(text, number)` one of None, "stall", "garbage", "hang up"
    or a status, for the request `number` from 0. Counts what it saw.
    """

    def __init__(self, answer=lambda text: "Sure, here it is.", trouble=lambda text, number: None):
        self.answer, self.trouble = answer, trouble
        self.seen: list[str] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()


@contextmanager
def serving(plan: Plan):
    """The server's base address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            with plan.lock:
                number = len(plan.seen)
                plan.seen.append(text)
                plan.bodies.append(body)
                plan.keys.append(self.headers.get("Authorization"))
            trouble = plan.trouble(text, number)
            if trouble == "stall":
                time.sleep(1.0)
                self.close_connection = True
                return None
            if trouble == "hang up":
                self.close_connection = True
                return None
            if trouble == "garbage":
                return self.reply(200, b"<html>not json")
            if trouble == "no text":
                return self.reply(200, b'{"choices": [{"message": {}}]}')
            if trouble is not None:
                return self.reply(trouble, b'{"error": "no"}')
            said = plan.answer(text)
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "text": said,
                "message": {"role": "assistant", "content": said},
            }
            return self.reply(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode())

        def reply(self, status, data):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def spec(url: str, **more) -> str:
    """A model's name on the command line, with short waits."""
    options = {"timeout_s": 0.4, "retries": 2, "backoff_s": 0.01, "concurrency": 8} | more
    return f"{url}#tiny?" + "&".join(f"{key}={value}" for key, value in options.items())
