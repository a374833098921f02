"""The hub's upload protocol, added to the small server of its downloads; for tests.

As huggingface_hub speaks it without the storage of chunks (xet): make a repository, ask how each
file is to be sent, put the large ones into storage, commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import yaml

from persona_assets_tests.hub_server import (
    Answer,
    Fault,
    Handler,
    Hub,
    Refusal,
    Repository,
    Request,
    as_json,
    git_hash,
    is_large,
    refused,
    serving,
    sha256_of,
)

#: Where files for large-file storage are put: another host than the hub's, by its name.
INBOX = "/inbox/"
#: What a new repository holds.
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class WritableHub(Hub):
    """A hub that who has the token may write to.

    Attributes:
        token: The one token that may read private repositories, and write.
        objects: Large-file storage, by SHA-256.
        ignored: Paths that the repositories' .gitignore excludes.
    """

    token: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def repository(self, name: str, kind: str) -> Repository:
        (found,) = (r for r in self.repositories if (r.name, r.kind) == (name, kind))
        return found

    def steps(self) -> list[str]:
        """What was asked for by the writing requests, in order: ``create``, ``commit``, …"""
        return [_step(request) for request in self.requests if request.method in ("POST", "PUT")]


class WritingHandler(Handler):
    """Answers writing requests too."""

    hub: WritableHub

    def look_up(self, path: str, query: Mapping[str, list[str]]) -> Answer:
        private = any(r.private and f"{r.name}/" in path for r in self.hub.repositories)
        if private and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return refused(Refusal(401, "RepoNotFound"))
        return super().look_up(path, query)

    def do_POST(self) -> None:
        self.write_to(unquote(urlsplit(self.path).path))

    def do_PUT(self) -> None:
        self.write_to(unquote(urlsplit(self.path).path))

    def write_to(self, path: str) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        step = _step(Request(self.command, path, None, 0))
        fault = next(self.hub.faults.get(step, iter(())), None)
        if isinstance(fault, Refusal):
            answer = refused(fault)
        elif step == "put":
            self.hub.objects[path.removeprefix(INBOX)] = body
            answer = Answer(200, b"", {})
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            answer = refused(Refusal(401))
        else:
            answer = self.written(step, path, body)
        self.send(answer, len(answer.content), fault is Fault.DROP)

    def written(self, step: str, path: str, body: bytes) -> Answer:
        if step == "validate-yaml":
            return _validated(json.loads(body)["content"])
        if step == "create":
            return self.create(json.loads(body))
        repository = next(
            r
            for r in self.hub.repositories
            if path.startswith((f"{r.api}/", f"{r.page}/", f"{r.page}.git/"))
        )
        if step == "commit":
            return self.commit(repository, [json.loads(line) for line in body.splitlines()])
        asked = json.loads(body)
        if step == "preupload":
            return as_json({"files": [self.mode(repository, file) for file in asked["files"]]})
        if step == "batch":
            return as_json({"objects": [self.upload(entry) for entry in asked["objects"]]})
        stored = self.hub.objects.get(asked["oid"])  # verify
        whole = stored is not None and sha256_of(stored) == asked["oid"]
        return as_json({}) if whole else refused(Refusal(422))

    def create(self, asked: Mapping[str, str]) -> Answer:
        name, kind = f"{asked['organization']}/{asked['name']}", asked["type"]
        there = [r for r in self.hub.repositories if (r.name, r.kind) == (name, kind)]
        private = asked.get("visibility") == "private"
        made = there or [Repository(name, kind, {_commit_hash(name, kind): ATTRIBUTES}, private)]
        if not there:
            self.hub.repositories += made
        return as_json({"url": f"{self.hub.endpoint}{made[0].page}"}, 409 if there else 200)

    def mode(self, repository: Repository, file: Mapping[str, object]) -> dict[str, object]:
        path, large = file["path"], is_large(file["path"])
        there = repository.files.get(path)
        oid = there and (sha256_of(there) if large else git_hash(there))
        told = {"path": path, "shouldIgnore": path in self.hub.ignored, "oid": oid}
        return told | {"uploadMode": "lfs" if large else "regular"}

    def upload(self, entry: Mapping[str, object]) -> Mapping[str, object]:
        if entry["oid"] in self.hub.objects:
            return entry
        port = self.server.server_port
        actions = {
            "upload": {"href": f"http://localhost:{port}{INBOX}{entry['oid']}"},
            "verify": {"href": f"{self.hub.endpoint}{self.path.partition('.git/')[0]}/verify"},
        }
        return {**entry, "actions": actions}

    def commit(self, repository: Repository, lines: list[Mapping[str, Mapping]]) -> Answer:
        header, *operations = ((line["key"], line["value"]) for line in lines)
        if header[1].get("parentCommit", repository.head) != repository.head:
            return refused(Refusal(412))
        files = dict(repository.files)
        for key, value in operations:
            match key:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = _commit_hash(repository.head, *(json.dumps(line) for line in lines))
        repository.commits[commit] = files
        url = f"{self.hub.endpoint}{repository.page}/commit/{commit}"
        return as_json({"success": True, "commitOid": commit, "commitUrl": url})


@contextmanager
def writable_hub(
    token: str,
    faults: Mapping[str, Iterable[Fault | Refusal | None]] | None = None,
    ignored: Iterable[str] = (),
) -> Iterator[WritableHub]:
    """An empty hub on loopback.

    Args:
        faults: By step (``create``, ``preupload``, ``batch``, ``put``, ``verify``, ``commit``,
            ``validate-yaml``), what goes wrong with each request, one after another: refused, or
            done and not answered.
        ignored: As in :class:`WritableHub`.
    """
    pending = {step: iter(each) for step, each in (faults or {}).items()}
    hub = WritableHub([], faults=pending, token=token, ignored=frozenset(ignored))
    with serving(hub, WritingHandler):
        yield hub


def _step(request: Request) -> str:
    """What a writing request is for."""
    if request.path.startswith(INBOX):
        return "put"
    parts = request.path.split("/")
    return next((s for s in ("preupload", "commit") if s in parts), parts[-1])


def _validated(card: str) -> Answer:
    """Whether a README.md has front matter that is YAML, as the hub asks."""
    _, front, _ = card.split("---\n", 2)
    try:
        errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no mapping"}]
    except yaml.YAMLError as error:
        errors = [{"message": str(error)}]
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _commit_hash(*parts: str) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()
