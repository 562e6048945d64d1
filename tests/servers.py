"""An http server of a folder that counts its requests and fails as it is told, and an S3-compatible server."""

import contextlib
import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: A fault answers a request itself and returns True, or returns False and leaves it to the server.
Fault = Callable[[http.server.SimpleHTTPRequestHandler], bool]


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of the folder.
        requests: "GET /name" and "HEAD /name" of all requests so far.
        faults: by file name, taken from the front by each request of that file.
        delay_seconds: before every answer.
    """

    url: str = ""
    requests: list[str] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    delay_seconds: float = 0.0

    def count(self, name: str) -> int:
        """How often the file was asked for."""
        return self.requests.count(f"GET /{name}")


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *args, **kwargs):
        self.state = server
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def _answer(self, go_on: Callable[[], None]) -> None:
        self.state.requests.append(f"{self.command} {self.path}")
        time.sleep(self.state.delay_seconds)
        waiting = self.state.faults.get(self.path[1:])
        with contextlib.suppress(ConnectionError):
            if not (waiting and waiting.pop(0)(self)):
                go_on()

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serves a folder over http, with a page that lists it."""
    state = Server()
    handler = functools.partial(_Handler, state, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False  # some answer for a long time yet
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def answer(status: int) -> Fault:
    def fail(handler) -> bool:
        handler.send_error(status)
        return True

    return fail


def redirect(place: str) -> Fault:
    def fail(handler) -> bool:
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return fail


def send_part(content: bytes, num_announced: int) -> Fault:
    """Announces so many bytes, sends these, and closes the connection."""

    def fail(handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(num_announced))
        handler.end_headers()
        handler.wfile.write(content)
        handler.wfile.flush()
        handler.close_connection = True
        return True

    return fail


def send(content: bytes) -> Fault:
    """Another content, whole."""
    return send_part(content, len(content))


def be_silent(seconds: float) -> Fault:
    """Answers too late."""

    def fail(handler) -> bool:
        time.sleep(seconds)
        return False

    return fail


def hang_up(handler) -> bool:
    """Closes the connection without an answer."""
    handler.close_connection = True
    return True
