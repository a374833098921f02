"""Dagster's own databases: seen to be whole and writable before a run, named where they fail it.

They hold the history of runs that the web interface shows. No result is read from them. They are
SQLite's files, or one Postgres database where the ``dagster.yaml`` of DAGSTER_HOME says so.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from persona_assets import environment
from persona_assets.disk import DiskError, refusal, require_writable, room

#: Those of all runs, in the folder of ``environment.DAGSTER_STORAGE``; each run has its own beside.
DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")


class DatabaseUnusable(RuntimeError):
    """A database of Dagster's cannot be used; names it, the reason and the remedy."""


class DatabaseDamaged(DatabaseUnusable):
    """A database file of Dagster's is damaged."""


def check_databases() -> None:
    """See that Dagster's databases, as far as there are any, are whole and can be written.

    Raises:
        DatabaseDamaged: one is not whole.
        DatabaseUnusable: Postgres does not answer, or lets us not write.
        DiskError: one cannot be written.
    """
    folder = _folder()
    require_writable(folder)
    storage = _settings().get("storage", {})
    if "postgres" in storage:
        if {"PGHOST", "PGDATABASE"} <= set(_variables(storage)):  # as deploy/ says it
            _check_postgres()
        return
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


def _settings() -> Any:
    """The ``dagster.yaml`` of DAGSTER_HOME; nothing where there is none.

    Raises:
        DatabaseUnusable: it takes from the environment what is not set there.
    """
    path = Path(os.environ.get("DAGSTER_HOME", ""), "dagster.yaml")
    if not path.is_file():
        return {}
    settings = yaml.safe_load(path.read_text("utf-8")) or {}
    if unset := [name for name in _variables(settings) if not os.environ.get(name)]:
        raise DatabaseUnusable(
            f"{path} reads what the environment does not say: set {', '.join(unset)}"
        )
    return settings


def _variables(settings: Any) -> Iterator[str]:
    """The environment variables that settings of Dagster's name, as ``env: NAME``."""
    if isinstance(settings, dict):
        if settings.keys() == {"env"}:
            yield settings["env"]
        for value in settings.values():
            yield from _variables(value)


def _check_postgres() -> None:
    try:
        import psycopg2
    except ImportError as error:
        raise DatabaseUnusable(
            "Dagster's history is to be in Postgres: install persona_assets[postgres]"
        ) from error

    with (
        databases_named(),
        closing(psycopg2.connect(connect_timeout=10)) as db,
        db.cursor() as cursor,
    ):
        cursor.execute(
            "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on', "
            "coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)"
        )
        read_only, makes_tables = cursor.fetchone()
    if read_only:
        raise _unusable_postgres("it can only be read: name the primary, not a standby")
    if not makes_tables:
        raise _unusable_postgres("its user may make no tables there: make that the owner")


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
    """Let what is said of Dagster's databases be told with the path, or address, and the remedy.

    Raises:
        DatabaseDamaged, DiskError: in place of SQLite's error, or of one that was raised for it.
        DatabaseUnusable: in place of one of Postgres's.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and not isinstance(link, (sqlite3.Error, *_postgres_errors())):
            link = link.__cause__ or link.__context__
        if link is None:
            raise
        if not isinstance(link, sqlite3.Error):
            raise _unusable_postgres(str(link).strip()) from error
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
    if re.match(r"(sqlalchemy\.exc\.\w+: \()?psycopg2\.(Operational|Interface)Error", message):
        return str(_unusable_postgres(message))
    return message


def _postgres_errors() -> tuple[type[Exception], ...]:
    """What psycopg2 raises where the server is gone, or refuses; nothing if it was never loaded."""
    if (psycopg2 := sys.modules.get("psycopg2")) is None:
        return ()
    return (psycopg2.OperationalError, psycopg2.InterfaceError)


def _unusable_postgres(what: str) -> DatabaseUnusable:
    host, port, user, _, database = (os.environ.get(name, "") for name in environment.POSTGRES)
    return DatabaseUnusable(
        f"Dagster's Postgres database {database} at {host}:{port} cannot be used ({what}). It "
        f"holds the history of runs, and no result. User {user} owns it? See that it runs, and "
        f"what {', '.join(environment.POSTGRES)} say. Then run it again."
    )


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
