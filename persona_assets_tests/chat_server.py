"""A chat-completions server on loopback that misbehaves as a test's script says."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Step:
    """What the server does with one arrival.

    ``drop`` closes the connection without a word; ``hold`` seconds pass before anything happens,
    and ``dribble`` seconds after each byte (of the head, too, if ``dribbles_head``).
    """

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    hold: float = 0.0
    drop: bool = False
    dribble: float = 0.0
    dribbles_head: bool = False


@dataclass(frozen=True)
class Arrival:
    """One request as it came in: its body (as text), its bearer token, and which try it was."""

    body: str
    authorization: str | None
    attempt: int

    @property
    def request(self) -> dict[str, Any]:
        """The parsed body."""
        return json.loads(self.body)

    @property
    def question(self) -> str:
        """The first line of the user's message."""
        return self.request["messages"][-1]["content"].partition("\n")[0]


Script = Callable[[Arrival], Step]


class ChatServer:
    """What a running server has seen.

    Attributes:
        url: The base URL, ``…/v1``.
        arrivals: Every request, in order of arrival.
        paid: How often each body was answered with 200: what a service would charge for.
        most_in_flight: The largest number of requests that were being answered at once.
    """

    def __init__(self, script: Script):
        self.script = script
        self.url = ""
        self.arrivals: list[Arrival] = []
        self.paid: Counter[str] = Counter()
        self.most_in_flight = 0
        self._in_flight = 0
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()

    def arrive(self, body: str, authorization: str | None) -> Arrival:
        with self._lock:
            self._tries[body] += 1
            arrival = Arrival(body, authorization, self._tries[body])
            self.arrivals.append(arrival)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        return arrival

    def leave(self, arrival: Arrival, step: Step) -> None:
        with self._lock:
            self._in_flight -= 1
            self.paid[arrival.body] += step.status == 200 and not step.drop


def completion(
    text: str | None,
    *,
    finish_reason: str = "stop",
    refusal: str | None = None,
    usage: tuple[int, int] | None = (200, 50),
    hold: float = 0.0,
) -> Step:
    """A 200 in the protocol's form."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    value: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }
    if usage is not None:
        prompt, written = usage
        value["usage"] = {"prompt_tokens": prompt, "completion_tokens": written}
    return Step(body=json.dumps(value), hold=hold)


def failure(status: int, message: str = "no luck", *, hold: float = 0.0, **headers: str) -> Step:
    """An error in the protocol's form; ``retry_after_ms="5"`` names a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Step(status, json.dumps({"error": {"message": message}}), named, hold)


@contextmanager
def chat_server(script: Script) -> Iterator[ChatServer]:
    """Serve ``POST /v1/chat/completions`` by ``script`` while the context lasts."""
    chat = ChatServer(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            arrival = chat.arrive(body, self.headers["Authorization"])
            step = chat.script(arrival)
            time.sleep(step.hold)
            chat.leave(arrival, step)
            if step.drop:
                self.close_connection = True
                return
            content = step.body.encode()
            headers = {"Content-Type": "application/json", **step.headers}
            self.send_response(step.status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            if step.dribbles_head:
                self._dribble(b"".join(self._headers_buffer) + b"\r\n", step.dribble)
            else:
                self.end_headers()
            if step.dribble:
                self._dribble(content, step.dribble)
            else:
                self.wfile.write(content)

        def _dribble(self, content: bytes, seconds: float) -> None:
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(seconds)

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *arguments: object) -> None:
            """A client that was killed or timed out is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
