"""vLLM's own OpenAI server on the CPU, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

WAIT_S = 120


@contextmanager
def serving(folder):
    """The address of a server that serves the model of `folder` as `tiny`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", folder, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 256, "--no-enable-chunked-prefill"]
    words += ["--max-num-batched-tokens", 2048, "--logprobs-mode", "raw_logprobs", "--generation-config", "vllm"]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            give_up = time.monotonic() + WAIT_S
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except (OSError, urllib.error.URLError):
                    assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
                    assert time.monotonic() < give_up
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)
