"""A web server on the loopback interface whose answers are set by a test."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """`asked` lists the requests so far (method and path), `ranges` their Range headers."""

    def __init__(self, url: str) -> None:
        self.url, self.asked, self.ranges = url, list[tuple[str, str]](), list[str | None]()


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """Run a server that calls `answer` for every request, each in its own thread."""
    found: list[Server] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # the connection closes after the answer

        def do_GET(self) -> None:
            found[0].asked.append((self.command, self.path))
            found[0].ranges.append(self.headers["Range"])
            with contextlib.suppress(ConnectionError):  # the client did not wait
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
    """Return an empty answer with this status."""

    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return send


def file(
    content: bytes,
    cuts: tuple[int, ...] = (),
    silent: float = 0,
    every: float = 0,
    ranges: bool = True,
    length: bool = True,
) -> Answer:
    """Return an answer that sends a file, or the requested range of it.

    Args:
        cuts: number of bytes after which the first answers are cut, one each; later answers are complete.
        silent: seconds of silence before a cut answer's connection closes.
        every: seconds between two bytes.
        ranges: False ignores Range headers.
        length: False omits the Content-Length header.
    """
    left = itertools.chain(cuts, itertools.repeat(None))

    def send(request: BaseHTTPRequestHandler) -> None:
        asked, cut = request.headers["Range"], next(left)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and ranges else 0
        if start >= len(content) > 0 and asked and ranges:
            return status(416)(request)
        request.send_response(206 if asked and ranges else 200)
        if asked and ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if length:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        part = content[start:] if cut is None else content[start : start + cut]
        for block in [part[i : i + 1] for i in range(len(part))] if every else [part]:
            request.wfile.write(block)
            time.sleep(every)
        if cut is not None:
            time.sleep(silent)
        return None

    return send


def silent(seconds: float) -> Answer:
    """Return an answer that sends nothing for `seconds` and then closes the connection."""
    return lambda request: time.sleep(seconds)
