"""Every reply that a chat API was paid for, by the content of its request.

One SQLite file for all studies. Its rollback journal makes each reply's commit atomic, whatever
kills the process; a lock on a file beside it makes looking up, paying and storing one step, and the
system releases it when its holder dies.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_assets.hashing import sha256_json

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS replies (
        key TEXT PRIMARY KEY,
        study TEXT NOT NULL,
        request TEXT NOT NULL,
        reply TEXT NOT NULL,
        prompt_tokens INTEGER,
        completion_tokens INTEGER,
        cost_usd REAL NOT NULL,
        created_at TEXT NOT NULL
    )
"""
_SECONDS_TO_WAIT = 60.0  # for another connection's commit, which takes milliseconds


class RepliesError(RuntimeError):
    """The file of paid replies cannot be used; names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One paid reply.

    Attributes:
        body: The response's whole body.
        prompt_tokens, completion_tokens: As the endpoint counted them; None if it did not say.
        cost_usd: What it cost, in US dollars.
    """

    body: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float


def key_of(request: dict[str, Any]) -> str:
    """The key of a request: the hash of its canonical JSON (endpoint, model, messages, limits)."""
    return sha256_json(request)


class Replies:
    """The paid replies in one file, which is created when first used. Safe to share by threads."""

    def __init__(self, file: Path):
        self.file = file
        self._writing = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the right to pay, alone among all processes and threads; waits for it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_name(f"{self.file.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def get(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The replies there are, by key.

        Raises:
            RepliesError: the file cannot be read.
        """
        columns = "reply, prompt_tokens, completion_tokens, cost_usd"
        query = f"SELECT {columns} FROM replies WHERE key = ?"
        with self._connection() as connection:
            rows = {key: connection.execute(query, (key,)).fetchone() for key in keys}
        return {key: Reply(*row) for key, row in rows.items() if row is not None}

    def add(self, request: dict[str, Any], reply: Reply, study: str) -> None:
        """Commit what ``study`` paid for; it is on disk when this returns.

        Raises:
            RepliesError: the file cannot be written, or holds a reply to that request already.
        """
        tokens = (reply.prompt_tokens, reply.completion_tokens)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        request_json = json.dumps(request, ensure_ascii=False)
        row = (key_of(request), study, request_json, reply.body, *tokens, reply.cost_usd, now)
        with self._writing, self._connection() as connection:
            connection.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def spent_usd(self, study: str) -> float:
        """What ``study`` has paid in all, in US dollars.

        Raises:
            RepliesError: the file cannot be read.
        """
        with self._connection() as connection:
            query = "SELECT total(cost_usd) FROM replies WHERE study = ?"
            return connection.execute(query, (study,)).fetchone()[0]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One transaction, committed at the end."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.file, timeout=_SECONDS_TO_WAIT)) as connection:
                connection.execute(_SCHEMA)
                with connection:
                    yield connection
        except sqlite3.OperationalError as error:  # locked, read-only, disk full, another schema
            raise RepliesError(
                f"{self.file}: the paid replies cannot be used ({error}). See that it is a file of "
                "paid replies, writable, on a disk with space left; what it holds is kept"
            ) from error
        except sqlite3.IntegrityError as error:
            raise RepliesError(
                f"{self.file}: a reply was paid for twice ({error}). See that the folder's file "
                "system has locks (flock): without them, write rationales in one process at a time"
            ) from error
        except sqlite3.DatabaseError as error:
            raise RepliesError(
                f"{self.file}: the paid replies are damaged ({error}). Restore the file from a "
                f"backup, or save what can be read with `sqlite3 {self.file.name} .recover`; moved "
                "away, its replies are paid for again"
            ) from error
