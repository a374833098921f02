"""A small server of what the W&B client asks for when it syncs a run, on loopback, for tests.

Operations are told apart by their name; one that is not known is answered with an error, which
fails the client's work and so the test.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

ENTITY = "team"
_NOW = "2026-01-01T00:00:00Z"


@dataclass
class Wandb:
    """What the server was sent.

    Attributes:
        url: Where it listens.
        runs: By run id, the fields of the run as it was upserted last, and its history in ``rows``.
        artifacts: By id: name, digest, metadata, aliases, the run that logged it, and ``files``,
            path → content.
        uses: (run id, artifact id) of each artifact declared as an input.
        keys: The API keys that came with the requests.
        requests: Every request, in order: method, path, and the operation of a GraphQL one.
        refuses: Whether it knows no key.
        loses: Whether an artifact's files are lost on their way into it.
    """

    url: str = ""
    refuses: bool = False
    loses: bool = False
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    uses: list[tuple[str, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data for a GraphQL operation.

        Raises:
            AttributeError: it is not known.
        """
        return getattr(self, f"_{operation}")(given)

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Take lines of a run's files."""
        lines = files.get("wandb-history.jsonl", {}).get("content", ())
        self.runs[run]["rows"] += map(json.loads, lines)
        for summary in files.get("wandb-summary.json", {}).get("content", ()):
            self.runs[run]["summary"] = json.loads(summary)

    def _Viewer(self, given):
        return {"viewer": None if self.refuses else _VIEWER}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, given):
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, given):
        name = given["name"]
        run = self.runs.setdefault(name, {"rows": [], "files": {}})
        run |= {field: value for field, value in given.items() if value is not None}
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": run["displayName"], "project": project}
        bucket |= {"description": None, "config": "{}", "sweepName": None, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _CreateArtifact(self, given):
        asked = given["input"]
        name, digest = asked["artifactCollectionName"], asked["digest"]
        for known, artifact in self.artifacts.items():
            if (artifact["name"], artifact["digest"]) == (name, digest):
                return _created(known, "COMMITTED")
        key = f"artifact{len(self.artifacts)}"
        aliases = [alias["alias"] for alias in asked["aliases"]]
        self.artifacts[key] = {
            **{"name": name, "digest": digest, "aliases": aliases, "run": asked["runName"]},
            **{"metadata": json.loads(asked["metadata"]), "type": asked["artifactTypeName"]},
            **{"files": {}, "state": "PENDING"},
        }
        return _created(key, "PENDING")

    def _CreateArtifactManifest(self, given):
        return {"createArtifactManifest": {"artifactManifest": self._manifest(given)}}

    def _UpdateArtifactManifest(self, given):
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(given)}}

    def _manifest(self, given):
        artifact = given.get("artifactID") or given["artifactManifestID"]
        slot = {"id": "file", "uploadUrl": self._slot(artifact, "wandb_manifest.json")}
        return {"id": artifact, "file": slot | {"uploadHeaders": []}}

    def _slot(self, artifact: str, path: str) -> str:
        return f"{self.url}/upload/{artifact}/{quote(path)}"

    def _CreateArtifactFiles(self, given):
        nodes = [
            {
                **{"storagePath": spec["name"], "uploadHeaders": [], "uploadMultipartUrls": None},
                "uploadUrl": self._slot(spec["artifactID"], spec["name"]),
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, given):
        key = given["artifactID"]
        if self.loses:
            raise AttributeError("the artifact's files are lost")
        self.artifacts[key]["state"] = "COMMITTED"
        return {
            "commitArtifact": {"artifact": {"id": key, "digest": self.artifacts[key]["digest"]}}
        }

    def _CreateRunFiles(self, given):
        files = [{"name": n, "uploadUrl": self._slot("run", n)} for n in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactMembershipByName(self, given):
        name, _, alias = given["name"].partition(":")
        found = [
            (key, artifact)
            for key, artifact in self.artifacts.items()
            if artifact["name"] == name and alias in artifact["aliases"]
            if artifact["state"] == "COMMITTED"
        ]
        membership = _membership(*found[0]) if found else None
        return {"project": {"artifactCollectionMembership": membership}}

    def _UseArtifact(self, given):
        self.uses.append((given["runName"], given["artifactID"]))
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}


def _created(key: str, state: str) -> dict[str, Any]:
    artifact = {"id": key, "state": state, "artifactSequence": {"latestArtifact": None}}
    return {"createArtifact": {"artifact": artifact}}


def _membership(key: str, artifact: dict[str, Any]) -> dict[str, Any]:
    project = {"id": "p", "internalId": "p", "name": "tiny-project", "entity": {"name": ENTITY}}
    collection = {"name": artifact["name"], "project": project}
    return {
        "__typename": "ArtifactCollectionMembership",
        "id": f"membership-{key}",
        "versionIndex": 0,
        "createdAt": _NOW,
        "aliases": [
            {"__typename": "ArtifactAlias", "id": alias, "alias": alias}
            for alias in artifact["aliases"]
        ],
        "artifactCollection": {"__typename": "ArtifactSequence"} | collection,
        "artifact": {
            "__typename": "Artifact",
            "id": key,
            "artifactSequence": {"__typename": "ArtifactSequence"} | collection,
            "artifactType": {"name": artifact["type"]},
            "metadata": json.dumps(artifact["metadata"]),
            "state": artifact["state"],
            "digest": artifact["digest"],
            **{"versionIndex": 0, "size": 1, "fileCount": 1, "createdAt": _NOW, "updatedAt": _NOW},
            **dict.fromkeys(("description", "historyStep", "commitHash")),
            **{"ttlDurationSeconds": 0, "ttlIsInherited": False, "tags": []},
        },
    }


_VIEWER = {
    **{"id": "viewer", "entity": ENTITY, "username": "tester", "email": "", "flags": "{}"},
    **{"teams": {"edges": []}, "admin": False, "apiKeys": None, "name": "", "deletedAt": None},
}


@contextmanager
def wandb_server(port: int = 0) -> Iterator[Wandb]:
    """The server, and what it was sent."""
    wandb = Wandb()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.body()
            kind, _, key = self.headers.get("Authorization", "").partition(" ")
            if kind == "Basic":
                wandb.keys.add(base64.b64decode(key).decode().partition(":")[2])
            operation = ""
            if self.path == "/graphql":
                asked = json.loads(body)
                (operation,) = re.findall(r"^\s*(?:query|mutation)\s+(\w+)", asked["query"], re.M)
                try:
                    found = {"data": wandb.answer(operation, asked.get("variables") or {})}
                except AttributeError as error:
                    found = {"errors": [{"message": str(error)}]}
                self.respond(found)
            elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                wandb.stream(found[1], json.loads(body).get("files") or {})
                self.respond({})
            else:
                self.respond({}, 404)
            wandb.requests.append((self.command, self.path, operation))

        do_GET = do_CONNECT = do_POST

        def do_PUT(self) -> None:
            content = self.body()
            _, _, artifact, path = self.path.split("/", 3)
            if artifact != "run":
                wandb.artifacts[artifact]["files"][unquote(path)] = content
            self.respond({})
            wandb.requests.append((self.command, self.path, ""))

        def body(self) -> bytes:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent

        def respond(self, value: object, status: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wandb.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield wandb
    finally:
        server.shutdown()
        server.server_close()
