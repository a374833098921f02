"""The engine server: one resident host, for the runs of many processes on this machine.

    GET  /engine   what is served: the host's identity and its engine's fingerprint
    POST /answers  {"checkpoint": {"folder", "sha256"} or null, "groups": […]}  →  one answer a line
    POST /probe    {"prompts": […], "first": …}  →  the host's reading of its base, now or at first

One request is worked on at a time, the others wait in order: answers under two checkpoints never
share a batch. A response's last line is ``{"end": true}``, or ``{"error": …, "kind": …}``; empty
lines say that the server lives. A client that goes away, or reads nothing for a minute, ends its
request. An error of the engine itself, or a base that no longer says what it said at first, ends
the server. Each POST names the ``identity`` that it is meant for. On the loopback interface only,
for no web page, and only checkpoints that lie in the store are served.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from persona_assets.evaluation.engines.wire import HEARTBEAT, pack_answer, pack_error, unpack_group
from persona_assets.evaluation.hosts import Host
from persona_assets.training.checkpoints import checkpoint_hash

log = logging.getLogger(__name__)

#: Bytes of a request at the most: a study of 10 000 long questions and 11 personas.
_LARGEST = 2**30
#: Lines that wait for a slow client before the engine waits too.
_AHEAD = 1000
#: Seconds that a client may take to send or to read the next bytes.
_PATIENCE = 60.0
#: What a request's own faults raise while it is read.
_NO_REQUEST = (KeyError, TypeError, AttributeError, OSError)


class EngineServer:
    """Serves a host over HTTP.

    Args:
        host: What is served; used from one thread.
        identity: What it is (``hosts.identity``), told to clients.
        store: The folder that checkpoints must lie in.
        port: On the loopback interface; 0 for any that is free.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, host: Host, identity: dict[str, Any], store: Path, port: int):
        self._host, self._store = host, store.resolve()
        self._stopping = threading.Event()
        #: The error that ended the server, where one did.
        self.failed: Exception | None = None
        self._engine_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._identity = json.loads(json.dumps(identity))
        fingerprint = self._engine_thread.submit(self._fingerprint).result()
        self.about = {"identity": self._identity, "fingerprint": fingerprint}
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True

    def _fingerprint(self) -> dict[str, str]:
        with self._host.serving(None) as engine:
            return engine.fingerprint

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def serve_forever(self) -> None:
        """Answer until :meth:`shut_down`, or until the process is interrupted."""
        self._http.serve_forever()

    def shut_down(self) -> None:
        """Break off what is at work, and give the host's memory back."""
        self._stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._engine_thread.submit(self._host.close).result()
        self._engine_thread.shutdown()

    def answers(self, body: dict[str, Any], gone: threading.Event) -> Iterator[dict[str, Any]]:
        """What POST /answers responds with, line by line; for the engine's thread.

        Raises:
            ValueError: a field is missing or of another kind; the checkpoint cannot be read, lies
                outside the store, or is not the one that was meant.
        """
        try:
            checkpoint = body["checkpoint"]
            folder = self._checked(**checkpoint) if checkpoint else None
            groups = [unpack_group(group) for group in body["groups"]]
        except _NO_REQUEST as error:  # told to the client; the engine has nothing to do with it
            raise ValueError(f"the request cannot be served ({error!r})") from error
        with self._host.serving(folder) as engine:
            for answer in engine.answer(groups):
                if gone.is_set() or self._stopping.is_set():
                    break
                yield pack_answer(answer)
        if folder is not None and not self._host.base_holds():
            raise RuntimeError("the base is no longer what was loaded: the server ends")

    def probe(self, body: dict[str, Any], gone: threading.Event) -> Iterator[dict[str, Any]]:
        """What POST /probe responds with; for the engine's thread.

        Raises:
            ValueError: a field is missing or of another kind.
        """
        prompts = body.get("prompts")
        if type(prompts) is not list or not all(type(prompt) is str for prompt in prompts):
            raise ValueError("prompts: expected a list of texts")
        ask = self._host.first_reading if body.get("first") else self._host.probe
        yield {"probe": ask(prompts).tolist()}

    def lines(
        self, work: Callable[[dict, threading.Event], Iterator[dict]], body: dict[str, Any]
    ) -> Iterator[str]:
        """The lines of a response, worked out in the engine's thread; closing it ends the work."""
        ready: queue.Queue[dict[str, Any] | None] = queue.Queue(_AHEAD)  # None: broken off
        gone = threading.Event()

        def put(line: dict[str, Any] | None) -> None:
            while not (gone.is_set() or self._stopping.is_set()):
                try:
                    ready.put(line, timeout=HEARTBEAT)
                    return
                except queue.Full:  # a slow client, or one that has gone
                    continue

        def break_off() -> None:
            with suppress(queue.Full):  # its reader finds out by itself then
                ready.put_nowait(None)

        def do() -> None:
            if gone.is_set() or self._stopping.is_set():
                break_off()
                return
            try:
                for line in work(body, gone):
                    put(line)
                put({"end": True})
            except ValueError as error:  # of what was asked: the server goes on
                put(pack_error(error))
            except Exception as error:
                log.exception("the engine failed, and with it the server")
                put(pack_error(error))
                self._fail(error)
            if self._stopping.is_set():
                break_off()

        job = self._engine_thread.submit(do)
        try:
            while True:
                try:
                    line = ready.get(timeout=HEARTBEAT)
                except queue.Empty:
                    if self._stopping.is_set():
                        return
                    yield "\n"
                    continue
                if line is None:
                    return
                yield json.dumps(line) + "\n"
                if "end" in line or "error" in line:
                    return
        finally:
            gone.set()
            job.cancel()

    def _fail(self, error: Exception) -> None:
        self.failed = error
        threading.Thread(target=self._http.shutdown, daemon=True).start()

    def refuses(self, body: dict[str, Any]) -> str | None:
        """Why a request is not for this server; None if it is."""
        wanted = body.get("identity")
        return None if wanted == self._identity else f"it serves {self._identity}, not {wanted}"

    def _checked(self, folder: str, sha256: str) -> Path:
        path = Path(folder).resolve()
        if not path.is_relative_to(self._store):
            raise ValueError(f"checkpoint {path}: lies outside this server's store, {self._store}")
        found = checkpoint_hash(path)
        if found != sha256:
            raise ValueError(f"checkpoint {path}: has hash {found}, and {sha256} was asked for")
        return path


def _handler(server: EngineServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0, the default: one request a connection, so that none hides in another's body.
        timeout = _PATIENCE  # of the connection, reading and writing

        def do_GET(self) -> None:
            if self._is_from_a_page():
                self._respond(403, {"error": "this server answers no web pages"})
            elif self.path == "/engine":
                self._respond(200, server.about)
            else:
                self._respond(404, {"error": f"there is no {self.path}"})

        def do_POST(self) -> None:
            work = {"/answers": server.answers, "/probe": server.probe}.get(self.path)
            length = self.headers.get("Content-Length", "")
            if self._is_from_a_page():
                self._respond(403, {"error": "this server answers no web pages"})
            elif work is None:
                self._respond(404, {"error": f"there is no {self.path}"})
            elif not re.fullmatch("[0-9]{1,10}", length) or int(length) > _LARGEST:
                self._respond(413, {"error": f"Content-Length: found {length[:20] or 'none'}"})
            elif self.headers.get("Content-Type") != "application/json":  # a web page's form, say
                self._respond(415, {"error": "Content-Type: expected application/json"})
            else:
                self._stream(work, self.rfile.read(int(length)))

        def _stream(self, work, raw: bytes) -> None:
            try:
                body = json.loads(raw)
            except (ValueError, RecursionError) as error:
                self._respond(400, {"error": f"the request is no JSON: {error}"})
                return
            if not isinstance(body, dict):
                self._respond(400, {"error": "the request is no JSON object"})
                return
            if why := server.refuses(body):
                self._respond(409, {"error": why})
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/jsonl")
            self.end_headers()
            lines = server.lines(work, body)
            try:
                for line in lines:
                    self.wfile.write(line.encode())
                    self.wfile.flush()
            except (ConnectionError, TimeoutError):  # the client has gone, or reads nothing
                pass
            finally:
                lines.close()

        def _is_from_a_page(self) -> bool:
            """Sent by a browser for some page, or meant for another host's name (rebinding)."""
            host = self.headers.get("Host", "").rpartition(":")[0]
            return "Origin" in self.headers or host not in ("127.0.0.1", "localhost")

        def _respond(self, status: int, value: dict[str, Any]) -> None:
            raw = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: what is served is told by the runs that ask."""

    return Handler
