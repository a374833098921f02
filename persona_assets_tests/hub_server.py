"""A small server of the hub's download protocol, on loopback, for tests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(repo: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve ``files`` as the model repository ``repo`` at :data:`REVISION`; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            status, content, headers = self.look_up(self.path.split("?")[0])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def look_up(self, path: str) -> tuple[int, bytes, dict[str, str]]:
            api, resolve = f"/api/models/{repo}", f"/{repo}/resolve/{REVISION}/"
            if path in (f"{api}/revision/{REVISION}", f"{api}/tree/{REVISION}"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": REVISION, "siblings": siblings}
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
                value = tree if "/tree/" in path else info
                return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
            if path.startswith(resolve) and (name := path.removeprefix(resolve)) in files:
                etag = hashlib.sha256(files[name]).hexdigest()
                return 200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION}
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
