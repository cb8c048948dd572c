"""A server that speaks the OpenAI protocol, and fails as it is told to."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-planted-secret"


class Server(ThreadingHTTPServer):
    """Answers each request by the next step of a script, the last step for ever: a reply text or a status."""

    def __init__(self, *steps: str | int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.steps, self.bodies, self.keys = list(steps), [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("authorization"))
            step = server.steps.pop(0) if len(server.steps) > 1 else server.steps[0]
        if step == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = step if isinstance(step, str) else ""
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        answer = {"id": "1", "created": 1, "model": "m", "object": "x", "choices": [message], "usage": usage}
        data = json.dumps(answer).encode() if isinstance(step, str) else f'{{"error": "{SECRET}"}}'.encode()
        self.send_response(200 if isinstance(step, str) else step)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""
