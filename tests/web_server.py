"""A web server on the loopback interface that a test tells how to answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """`asked` are the requests so far: method and path."""

    def __init__(self, url: str) -> None:
        self.url, self.asked = url, list[tuple[str, str]]()


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """`answer` is called for every request, in a thread of its own."""
    found: list[Server] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # the connection ends with the answer

        def do_GET(self) -> None:
            found[0].asked.append((self.command, self.path))
            answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found.append(Server(f"http://127.0.0.1:{server.server_port}"))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield found[0]
        finally:
            server.shutdown()
            thread.join()


def status(code: int) -> Answer:
    """An empty answer of one status."""

    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return send
