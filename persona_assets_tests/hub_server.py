"""A small server of the hub's download protocol, on loopback, for tests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


class Answer(NamedTuple):
    """A response: HTTP status, body, headers."""

    status: int
    content: bytes
    headers: dict[str, str]


@dataclass
class Repository:
    """A repository: the files of each of its commits, oldest first; main is the last of them."""

    name: str
    kind: str
    commits: dict[str, dict[str, bytes]]
    private: bool = False

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the last commit, by path."""
        return self.commits[self.head]

    @property
    def page(self) -> str:
        return f"/{self.name}" if self.kind == "model" else f"/{self.kind}s/{self.name}"

    @property
    def api(self) -> str:
        return f"/api/{self.kind}s/{self.name}"


@dataclass
class Hub:
    """What a server serves, and what it does to requests: see :func:`hub_server`."""

    repositories: list[Repository]
    refuse: Refusal | None = None
    requests: list[Request] = field(default_factory=list)
    faults: Mapping[str, Iterator[Fault | Refusal | None]] = field(default_factory=dict)
    listing: Sequence[Mapping[str, object]] = ()
    ranges: bool = True
    endpoint: str = ""


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub ``server.hub``."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        url = urlsplit(self.path)
        path, fault = unquote(url.path), None
        answer = self.look_up(path, parse_qs(url.query))
        name = re.sub(r"^.*/resolve/[^/]*/", "", path.removeprefix(STORAGE))
        if body and answer.status == 200:
            fault = next(self.hub.faults.get(name, iter(())), None)
        if isinstance(fault, Refusal):
            answer = refused(fault)
        if answer.status == 200:
            answer = self.part(answer)
        content = answer.content
        if fault is Fault.CORRUPT:
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault is Fault.CUT:
            content = content[: len(content) // 2]
        if fault is Fault.DROP or not body:
            content = b""
        self.send(answer._replace(content=content), len(answer.content), fault is Fault.DROP)

    def send(self, answer: Answer, length: int, dropped: bool = False) -> None:
        """Note the request, and send the answer, of ``length`` bytes if whole; or nothing."""
        token, path = self.headers.get("Authorization"), unquote(urlsplit(self.path).path)
        names = [repository.name for repository in self.hub.repositories]
        if self.command in ("POST", "PUT") or any(name in path for name in (STORAGE, *names)):
            self.hub.requests.append(Request(self.command, path, token, len(answer.content)))
        if dropped:
            return
        self.send_response(answer.status)
        for header, value in ({"Content-Length": str(length)} | answer.headers).items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def look_up(self, path: str, query: Mapping[str, list[str]]) -> Answer:
        if path.startswith(STORAGE):
            return self.stored(path.removeprefix(STORAGE), query["sha256"][0])
        repository = next(
            (r for r in self.hub.repositories if path.startswith((f"{r.api}/", f"{r.page}/"))), None
        )
        if repository is None:
            return refused(Refusal(404, "RepoNotFound"))
        if self.hub.refuse is not None:
            return refused(self.hub.refuse)
        found = re.fullmatch(
            rf"({repository.api}/(revision|tree)|{repository.page}/(resolve))/([^/]+)(/.*)?", path
        )
        commit = found and (repository.head if found[4] == "main" else found[4])
        if commit not in repository.commits:
            return refused(Refusal(404, "RevisionNotFound"))
        files, rest = repository.commits[commit], (found[5] or "").removeprefix("/")
        if found[2] == "revision":
            siblings = [{"rfilename": name} for name in files]
            told = {"id": repository.name, "sha": commit, "private": repository.private}
            return as_json(told | {"siblings": siblings})
        if found[2] == "tree":
            return self.tree(files, rest, recursive=query.get("recursive") in (["true"], ["True"]))
        if rest not in files:
            return refused(Refusal(404, "EntryNotFound"))
        sha256 = sha256_of(files[rest])
        here = {"X-Repo-Commit": commit}
        if not is_large(rest):
            return Answer(200, files[rest], here | {"ETag": f'"{sha256}"'})
        port = self.server.server_port
        elsewhere = f"http://localhost:{port}{STORAGE}{quote(rest)}?sha256={sha256}"
        large = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(files[rest]))}
        return Answer(302, b"", here | large | {"Location": elsewhere})

    def stored(self, name: str, sha256: str) -> Answer:
        for repository in self.hub.repositories:
            for files in repository.commits.values():
                if name in files and sha256_of(files[name]) == sha256:
                    return Answer(200, files[name], {"ETag": f'"{sha256}"'})
        return refused(Refusal(404))

    def tree(self, files: Mapping[str, bytes], folder: str, recursive: bool) -> Answer:
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name in files:
            if name.startswith(prefix):
                top, *rest = name.removeprefix(prefix).split("/")
                if rest:
                    entries[prefix + top] = {"type": "directory", "oid": "0" * 40}
                if recursive or not rest:
                    entries[name] = _tree_entry(files[name], is_large(name))
        if not entries:
            return refused(Refusal(404, "EntryNotFound"))
        return as_json(
            [{"path": path} | entry for path, entry in entries.items()] + [*self.hub.listing]
        )

    def part(self, answer: Answer) -> Answer:
        """What was asked for of a whole file."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found or not self.hub.ranges:
            return answer
        size = len(answer.content)
        first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
        headers = answer.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
        return Answer(206, answer.content[first : last + 1], headers)

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


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
    hub = Hub(
        [Repository(repo, repo_type, {revision: dict(files)})],
        refuse,
        requests if requests is not None else [],
        {name: iter(each) for name, each in (faults or {}).items()},
        listing,
        ranges,
    )
    with serving(hub, Handler):
        yield hub.endpoint


@contextmanager
def serving(hub: Hub, handler: type[Handler]) -> Iterator[None]:
    """Serve a hub on a free port of loopback; its ``endpoint`` says which."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.hub = hub
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def is_large(name: str) -> bool:
    """Whether a file is in large-file storage."""
    return name.endswith((".safetensors", ".parquet", ".duckdb"))


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    """The name of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refused(refusal: Refusal) -> Answer:
    return Answer(refusal.status, b"{}", {"X-Error-Code": refusal.code} if refusal.code else {})


def _tree_entry(content: bytes, large: bool) -> dict[str, object]:
    entry = {"type": "file", "size": len(content), "oid": git_hash(content)}
    if large:
        entry["lfs"] = {"oid": sha256_of(content), "size": len(content), "pointerSize": 134}
    return entry
