"""A small server of the hub's download protocol, on loopback, for tests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Refusal(NamedTuple):
    """How the hub refuses: HTTP status and the header that says why, empty for none."""

    status: int
    code: str = ""


class Request(NamedTuple):
    """One request, as it came in."""

    method: str
    path: str
    token: str | None


@contextmanager
def hub_server(
    repo: str,
    files: Mapping[str, bytes],
    *,
    repo_type: str = "model",
    revision: str = REVISION,
    refuse: Refusal | None = None,
    requests: list[Request] | None = None,
) -> Iterator[str]:
    """Serve ``files`` as the one repository ``repo``, at the one commit; yields the endpoint.

    Args:
        repo: ``owner/name``.
        files: Content by path in the repository.
        repo_type: ``model`` or ``dataset``: their paths differ in the API and in downloads.
        revision: The commit.
        refuse: Answer whatever concerns the repository like this.
        requests: Where to append every request about the repository.
    """
    api = f"/api/{repo_type}s/{repo}"
    page = f"/{repo}" if repo_type == "model" else f"/{repo_type}s/{repo}"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            if requests is not None and repo in self.path:
                token = self.headers.get("Authorization")
                requests.append(Request(self.command, self.path, token))
            status, content, headers = self.look_up(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def look_up(self, path: str) -> tuple[int, bytes, dict[str, str]]:
            if not path.startswith((f"{api}/", f"{page}/resolve/")):
                return _refused(Refusal(404, "RepoNotFound"))
            if refuse is not None:
                return _refused(refuse)
            if path == f"{api}/revision/{revision}":
                siblings = [{"rfilename": name} for name in files]
                return _json({"id": repo, "sha": revision, "siblings": siblings})
            if path == f"{api}/tree/{revision}":
                return _json([_tree_entry(name, content) for name, content in files.items()])
            name = path.removeprefix(f"{page}/resolve/{revision}/")
            if name == path:
                return _refused(Refusal(404, "RevisionNotFound"))
            if name not in files:
                return _refused(Refusal(404, "EntryNotFound"))
            etag = hashlib.sha256(files[name]).hexdigest()
            return 200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": revision}

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


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _refused(refusal: Refusal) -> tuple[int, bytes, dict[str, str]]:
    return refusal.status, b"{}", {"X-Error-Code": refusal.code} if refusal.code else {}


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
