"""Dagster's own databases: seen to be whole and writable before a run, named where they fail it.

They hold the history of runs that the web interface shows. No result is read from them.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from persona_assets import environment
from persona_assets.disk import DiskError, refusal, require_writable, room

#: Those of all runs, in the folder of ``environment.DAGSTER_STORAGE``; each run has its own beside.
DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")


class DatabaseDamaged(RuntimeError):
    """A database of Dagster's is damaged; names file and remedy."""


def check_databases() -> None:
    """See that Dagster's databases, as far as there are any, are whole and can be written.

    Raises:
        DatabaseDamaged: one is not whole.
        DiskError: one cannot be written.
    """
    folder = _folder()
    require_writable(folder)
    for path in (folder / name for name in DATABASES):
        if not path.exists():
            continue
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            raise DiskError(refusal(error, path) or str(error)) from error
        with databases_named():
            if what := _damage(path):
                raise _damaged(path, what)


def _damage(path: Path) -> str:
    """What is wrong with a database; nothing if it is whole.

    Raises:
        sqlite3.Error: it cannot be read at all.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)) as db:
        try:
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, say, which is no damage
                raise
            return str(error)
    if found != "ok":
        return found.replace("\n", " ")
    return "" if tables else "it holds no table"


@contextmanager
def databases_named() -> Iterator[None]:
    """Let what SQLite says of Dagster's databases be told with the path and the remedy.

    Raises:
        DatabaseDamaged, DiskError: in place of SQLite's error, or of one that was raised for it.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and not isinstance(link, sqlite3.Error):
            link = link.__cause__ or link.__context__
        if link is None:
            raise
        folder = _folder()
        if not isinstance(link, sqlite3.OperationalError):  # which of them is it?
            for path in (folder / name for name in DATABASES):
                with suppress(sqlite3.OperationalError):
                    if path.exists() and (what := _damage(path)):
                        raise _damaged(path, what) from error
        raise DiskError(_unusable(str(link))) from error


def in_words(message: str) -> str:
    """What a failed step said, with path and remedy where Dagster could not write down the step."""
    if re.match(r"(sqlalchemy\.exc\.\w+: \()?sqlite3\.OperationalError", message):
        return _unusable(message)
    return message


def _unusable(what: str) -> str:
    folder = _folder()
    return (
        f"Dagster's databases in {folder} cannot be used ({what}). User {os.getuid()} needs the "
        f"right to write there, and room: {room(folder)}. Then run it again."
    )


def _damaged(path: Path, what: str) -> DatabaseDamaged:
    return DatabaseDamaged(
        f"{path} is damaged ({what}). It holds Dagster's history of runs, and no result. Stop what "
        f"uses it, move it away with its -wal and -shm, and run again: Dagster makes a new one."
    )


def _folder() -> Path:
    return Path(os.environ[environment.DAGSTER_STORAGE])
