"""A host whose model is in another process: the client of ``persona-assets serve``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from persona_assets.evaluation.engines.wire import (
    HEARTBEAT,
    pack_group,
    unpack_answer,
    unpack_error,
)
from persona_assets.evaluation.hosts import NoEngine
from persona_assets.evaluation.protocol import Answer, PromptGroup
from persona_assets.training.checkpoints import checkpoint_hash
from persona_assets.unavailable import Unavailable

_REMEDY = "start it with `persona-assets serve --study NAME`, or set PERSONA_ASSETS_ENGINE"


class RemoteHost:
    """Talks to an engine server (see ``hosts.Host``), which serves one client's request at a time.

    Args:
        url: The server's address.
        identity: What it must be serving (``hosts.identity``).

    Raises:
        Unavailable: nobody answers there.
        NoEngine: it serves another base model, or serves it otherwise; names each difference.
    """

    def __init__(self, url: str, identity: dict[str, Any]):
        self._url = url.rstrip("/")
        self._identity = wanted = json.loads(json.dumps(identity))
        told = self._about()
        other = [
            f"{field}: {told['identity'].get(field)} and not {value}"
            for field, value in wanted.items()
            if told["identity"].get(field) != value
        ]
        if other:
            raise NoEngine(
                f"the engine server at {self._url} serves {'; '.join(other)}. Stop it, and "
                "start one for this study with `persona-assets serve`."
            )
        self._fingerprint = told["fingerprint"]

    @contextmanager
    def serving(self, checkpoint: Path | None) -> Iterator[_RemoteEngine]:
        """See ``hosts.Host``; the server puts the checkpoint to use while it answers."""
        yield _RemoteEngine(self, self._fingerprint, checkpoint)

    def probe(self, prompts: Sequence[str]) -> np.ndarray:
        """As the server's host."""
        return self._probe(prompts, first=False)

    def first_reading(self, prompts: Sequence[str]) -> np.ndarray:
        """Since the server was started, whoever asked first."""
        return self._probe(prompts, first=True)

    def base_holds(self) -> bool:
        """The server sees to it, and ends where it does not."""
        return True

    def close(self) -> None:
        """The server goes on for others."""

    def _probe(self, prompts: Sequence[str], *, first: bool) -> np.ndarray:
        (found,) = self.ask("/probe", {"prompts": list(prompts), "first": first})
        return np.array(found["probe"], dtype=np.float32)

    def _about(self) -> dict[str, Any]:
        with self._reaching():
            answer = httpx2.get(f"{self._url}/engine", timeout=30)
        try:
            told = answer.raise_for_status().json()
            return {name: told[name] for name in ("identity", "fingerprint")}
        except (httpx2.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise NoEngine(
                f"what answers at {self._url} is no engine server ({error!r}): {_REMEDY}"
            ) from error

    def ask(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of the server's response, as they come.

        Raises:
            Unavailable: the server cannot be reached, or has died.
            NoEngine: another server stands in its place.
            CheckpointError, ValueError, RuntimeError: as the server's host raised it.
        """
        ended = False
        # While the server lives, no two lines are further apart than a heartbeat.
        timeout = httpx2.Timeout(30, read=6 * HEARTBEAT)
        with (
            self._reaching(),
            httpx2.stream(
                "POST", self._url + path, json=body | {"identity": self._identity}, timeout=timeout
            ) as response,
        ):
            if response.status_code >= 400:
                response.read()
                raise NoEngine(f"the engine server at {self._url} refused: {response.text[:500]}")
            for line in response.iter_lines():
                if not line:
                    continue
                found = json.loads(line)
                if "error" in found:
                    raise unpack_error(found)
                ended = "end" in found
                if not ended:
                    yield found
        if not ended:
            raise Unavailable(f"the engine server at {self._url} broke off: see its own log")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise Unavailable(
                f"the engine server at {self._url} does not answer ({error}): {_REMEDY}"
            ) from error


class _RemoteEngine:
    """Has a server answer, under one checkpoint (see ``protocol.Engine``)."""

    def __init__(self, host: RemoteHost, fingerprint: dict[str, str], checkpoint: Path | None):
        self.fingerprint = fingerprint
        self._host = host
        self._checkpoint = checkpoint and {
            "folder": str(checkpoint),
            "sha256": checkpoint_hash(checkpoint),
        }

    def answer(self, groups: Sequence[PromptGroup]) -> Iterator[Answer]:
        """Answers as the server has them."""
        body = {"checkpoint": self._checkpoint, "groups": [pack_group(group) for group in groups]}
        for line in self._host.ask("/answers", body):
            yield unpack_answer(line)
