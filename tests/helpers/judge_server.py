"""A chat endpoint on this machine, which answers as a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Said(NamedTuple):
    """A response of the server: its code, its body as it is, and headers."""

    body: str | bytes
    code: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


def chat(text: Any) -> Said:
    """A response in the form that chat endpoints have."""
    return Said(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))


class ChatServer:
    """What a running server was asked.

    Attributes:
        url: what goes before `/chat/completions`.
        bodies: of all requests, in the order they came.
        headers: of all requests.
        paths: of all requests.
        most: how many requests were there at once.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Said]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most = 0
        self._answer, self._now, self._lock = answer, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                said = outer._take(body, dict(self.headers), self.path)
                self.send_response(said.code)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said.body if isinstance(said.body, bytes) else said.body.encode())

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def _take(self, body: dict[str, Any], headers: dict[str, str], path: str) -> Said:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return self._answer(body)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Said]) -> Iterator[ChatServer]:
    """Run a server for the length of a `with` block."""
    running = ChatServer(answer)
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running.server.shutdown()
        running.server.server_close()
        thread.join()
