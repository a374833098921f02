"""A small server of the hub's download protocol, on loopback, for tests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from huggingface_hub import constants

REVISION = "0123456789abcdef0123456789abcdef01234567"
#: Where the files in large-file storage are: another host than the hub's, by its name.
STORAGE = "/storage/"


class Refusal(NamedTuple):
    """How the hub refuses: HTTP status and the header that says why, empty for none."""

    status: int
    code: str = ""


class Fault(Enum):
    """What becomes of a file on its way: other bytes, half of them, or no answer at all."""

    CORRUPT = "corrupt"
    CUT = "cut"
    DROP = "drop"


class Request(NamedTuple):
    """One request, as it came in, and how many bytes were sent in answer."""

    method: str
    path: str
    token: str | None
    sent: int


class _Answer(NamedTuple):
    status: int
    content: bytes
    headers: dict[str, str]


def point_client_at(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """The client reads HF_ENDPOINT once, at import; these are what it made of it."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def hub_server(
    repo: str,
    files: Mapping[str, bytes],
    *,
    repo_type: str = "model",
    revision: str = REVISION,
    refuse: Refusal | None = None,
    requests: list[Request] | None = None,
    faults: Mapping[str, Iterable[Fault | Refusal | None]] | None = None,
    listing: Sequence[Mapping[str, object]] = (),
    ranges: bool = True,
) -> Iterator[str]:
    """Serve ``files`` as the one repository ``repo``, at the one commit; yields the endpoint.

    As on the hub, safetensors files are in large-file storage: the listing has their SHA-256, and
    who asks for one is sent to another host, which must not be told the token.

    Args:
        repo: ``owner/name``.
        files: Content by path in the repository.
        repo_type: ``model`` or ``dataset``: their paths differ in the API and in downloads.
        revision: The commit.
        refuse: Answer whatever concerns the repository like this.
        requests: Where to append every request about the repository.
        faults: By path in the repository, what goes wrong with each GET of it, one after another;
            None and the end of them for nothing.
        listing: Entries to list in every folder, besides what is there.
        ranges: Whether ranges are answered, or the whole file is sent.
    """
    api = f"/api/{repo_type}s/{repo}"
    page = f"/{repo}" if repo_type == "model" else f"/{repo_type}s/{repo}"
    pending = {name: iter(each) for name, each in (faults or {}).items()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            url = urlsplit(self.path)
            path, fault = unquote(url.path), None
            answer = self.look_up(path, parse_qs(url.query))
            name = path.removeprefix(STORAGE).removeprefix(f"{page}/resolve/{revision}/")
            if body and answer.status == 200:
                fault = next(pending.get(name, iter(())), None)
            if isinstance(fault, Refusal):
                answer = _refused(fault)
            if answer.status == 200:
                answer = self.part(answer)
            content = answer.content
            if fault is Fault.CORRUPT:
                content = bytes([content[0] ^ 1]) + content[1:]
            if fault is Fault.CUT:
                content = content[: len(content) // 2]
            if fault is Fault.DROP or not body:
                content = b""
            if requests is not None and (repo in path or path.startswith(STORAGE)):
                token = self.headers.get("Authorization")
                requests.append(Request(self.command, path, token, len(content)))
            if fault is Fault.DROP:
                return
            self.send_response(answer.status)
            headers = {"Content-Length": str(len(answer.content))} | answer.headers
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content)

        def look_up(self, path: str, query: Mapping[str, list[str]]) -> _Answer:
            stored = path.removeprefix(STORAGE)
            if stored != path and stored in files:
                return _Answer(200, files[stored], {"ETag": f'"{_sha256(files[stored])}"'})
            if not path.startswith((f"{api}/", f"{page}/resolve/")):
                return _refused(Refusal(404, "RepoNotFound"))
            if refuse is not None:
                return _refused(refuse)
            if path == f"{api}/revision/{revision}":
                siblings = [{"rfilename": name} for name in files]
                return _json({"id": repo, "sha": revision, "siblings": siblings})
            if f"{path}/".startswith(f"{api}/tree/{revision}/"):
                folder = path.removeprefix(f"{api}/tree/{revision}").removeprefix("/")
                return self.tree(folder, recursive=query.get("recursive") == ["true"])
            name = path.removeprefix(f"{page}/resolve/{revision}/")
            if name == path:
                return _refused(Refusal(404, "RevisionNotFound"))
            if name not in files:
                return _refused(Refusal(404, "EntryNotFound"))
            sha256 = f'"{_sha256(files[name])}"'
            here = {"X-Repo-Commit": revision}
            if not _is_large(name):
                return _Answer(200, files[name], here | {"ETag": sha256})
            elsewhere = f"http://localhost:{self.server.server_port}{STORAGE}{quote(name)}"
            large = {"X-Linked-ETag": sha256, "X-Linked-Size": str(len(files[name]))}
            return _Answer(302, b"", here | large | {"Location": elsewhere})

        def tree(self, folder: str, recursive: bool) -> _Answer:
            prefix = f"{folder}/" if folder else ""
            entries = {}
            for name in files:
                if name.startswith(prefix):
                    top, *rest = name.removeprefix(prefix).split("/")
                    if rest:
                        entries[prefix + top] = {"type": "directory", "oid": "0" * 40}
                    if recursive or not rest:
                        entries[name] = _tree_entry(files[name], _is_large(name))
            if not entries:
                return _refused(Refusal(404, "EntryNotFound"))
            return _json([{"path": path} | entry for path, entry in entries.items()] + [*listing])

        def part(self, answer: _Answer) -> _Answer:
            """What was asked for of a whole file."""
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not found or not ranges:
                return answer
            size = len(answer.content)
            first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
            headers = answer.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
            return _Answer(206, answer.content[first : last + 1], headers)

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


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: object) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _refused(refusal: Refusal) -> _Answer:
    return _Answer(refusal.status, b"{}", {"X-Error-Code": refusal.code} if refusal.code else {})


def _tree_entry(content: bytes, large: bool) -> dict[str, object]:
    entry = {"type": "file", "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if large:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry
