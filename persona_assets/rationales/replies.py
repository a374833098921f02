"""Every reply that a chat API was paid for, by the content of its request.

One SQLite file for all studies. Its rollback journal makes each commit atomic, whatever kills the
process; a lock on a file beside it makes looking up, paying and storing one step, and the system
releases it when its holder dies.

A request is booked, at the most that it can cost, before it is sent: that proves the file writable
while nothing is paid, and leaves a trace of whatever is sent and never answered. A reply that
cannot be stored (a full disk) goes to a file of its own beside it, which the next to hold the
lock takes in.
"""

from __future__ import annotations

import fcntl
import glob
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from persona_assets.hashing import sha256_json
from persona_assets.store import write_atomically

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
    );
    CREATE INDEX IF NOT EXISTS spending ON replies (study, cost_usd);
    CREATE TABLE IF NOT EXISTS bookings (
        id TEXT PRIMARY KEY,
        key TEXT NOT NULL,
        study TEXT NOT NULL,
        at_most_usd REAL NOT NULL,
        created_at TEXT NOT NULL
    );
"""
#: How the names of files end that hold a paid reply each which the database did not take.
_ASIDE = ".unstored.json"
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


@dataclass(frozen=True, slots=True)
class Booking:
    """A request that ``study`` is about to pay for."""

    id: str
    request: dict[str, Any]
    study: str


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
        """Hold the right to pay, alone among all processes and threads; waits for it.

        Raises:
            RepliesError: the folder cannot be written, or replies set aside cannot be taken in.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock = self.file.with_name(f"{self.file.name}.lock").open("a")
        except OSError as error:
            raise self._unusable(error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._take_in()
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

    def book(self, request: dict[str, Any], study: str, at_most_usd: float) -> Booking:
        """Commit that ``study`` is about to send ``request``, which costs ``at_most_usd``.

        Raises:
            RepliesError: the file cannot be written; nothing may be sent.
        """
        booking = Booking(uuid4().hex, request, study)
        row = (booking.id, key_of(request), study, at_most_usd, _now())
        with self._writing, self._connection() as connection:
            connection.execute("INSERT INTO bookings VALUES (?, ?, ?, ?, ?)", row)
        return booking

    def release(self, booking: Booking) -> None:
        """Take a booking back: the endpoint charges nothing for the request.

        Raises:
            RepliesError: the file cannot be written.
        """
        with self._writing, self._connection() as connection:
            connection.execute("DELETE FROM bookings WHERE id = ?", (booking.id,))

    def settle(self, booking: Booking, reply: Reply) -> None:
        """Commit the reply to a booked request instead of the booking; on disk on return.

        Raises:
            RepliesError: the file cannot be written, in which case the reply is in a file beside
                it, or holds a reply to that request already.
        """
        paid = {
            "booking": booking.id,
            "key": key_of(booking.request),
            "study": booking.study,
            "request": json.dumps(booking.request, ensure_ascii=False),
            **asdict(reply),
            "created_at": _now(),
        }
        try:
            with self._writing, self._connection() as connection:
                _store(connection, paid, "INSERT")
        except RepliesError as error:
            if not isinstance(error.__cause__, sqlite3.IntegrityError):
                self._set_aside(paid)
            raise

    def spent_usd(self, study: str) -> float:
        """What ``study`` has paid in all and what it has booked, in US dollars.

        Raises:
            RepliesError: the file cannot be read.
        """
        with self._connection() as connection:
            query = "SELECT total(cost_usd) FROM replies WHERE study = ?"
            paid = connection.execute(query, (study,)).fetchone()[0]
        return paid + self.booked_usd(study)

    def booked_usd(self, study: str) -> float:
        """The most that the requests of ``study`` which were never answered can have cost.

        Raises:
            RepliesError: the file cannot be read.
        """
        with self._connection() as connection:
            query = "SELECT total(at_most_usd) FROM bookings WHERE study = ?"
            return connection.execute(query, (study,)).fetchone()[0]

    def _set_aside(self, paid: dict[str, Any]) -> None:
        """Keep a paid reply that the database did not take in a file of its own."""
        aside = self.file.with_name(f"{self.file.name}.{paid['booking']}{_ASIDE}")
        try:
            write_atomically(aside, json.dumps(paid))
        except OSError as error:
            raise self._unusable(error, "A reply that was paid for is lost, and booked") from error

    def _take_in(self) -> None:
        """Store the replies that were set aside; under the lock."""
        files = sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.*{_ASIDE}"))
        for file in files:
            with self._writing, self._connection() as connection:
                _store(connection, json.loads(file.read_text("utf-8")), "INSERT OR IGNORE")
            file.unlink()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One transaction, committed at the end."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.file, timeout=_SECONDS_TO_WAIT)) as connection:
                connection.executescript(_SCHEMA)
                with connection:
                    yield connection
        # Locked, read-only, disk full, another schema; or no folder to be had.
        except (sqlite3.OperationalError, OSError) as error:
            raise self._unusable(error) from error
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

    def _unusable(self, error: Exception, loss: str = "What it holds is kept") -> RepliesError:
        return RepliesError(
            f"{self.file}: the paid replies cannot be used ({error}). See that it is a file of "
            f"paid replies, writable, on a disk with space left. {loss}"
        )


def _store(connection: sqlite3.Connection, paid: dict[str, Any], insert: str) -> None:
    columns = ("key", "study", "request", "body", "prompt_tokens", "completion_tokens")
    row = [paid[column] for column in (*columns, "cost_usd", "created_at")]
    connection.execute(f"{insert} INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    connection.execute("DELETE FROM bookings WHERE id = ?", (paid["booking"],))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
