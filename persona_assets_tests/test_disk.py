"""What a disk refuses is told with path, reason and need, whoever raised it."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy
from polars.exceptions import ComputeError

from persona_assets import dagster_databases, environment
from persona_assets.dagster_databases import (
    DATABASES,
    DatabaseDamaged,
    DatabaseUnusable,
    check_databases,
    databases_named,
    in_words,
)
from persona_assets.disk import DiskError, refusal, require_writable
from persona_assets.store import Ref, Store, StoreError
from persona_assets_tests.conftest import PROJECT

REF = Ref("checkpoint", "librarian.garbage_cot.42")


@pytest.mark.parametrize(
    ("error", "needs"),
    [
        (OSError(errno.ENOSPC, "full"), "bytes are free there: make room"),
        (OSError(errno.EDQUOT, "quota"), "bytes are free there: make room"),
        (OSError(errno.EROFS, "ro"), "Mount its file system for writing"),
        (OSError(errno.EFBIG, "big"), "raise the limit"),
        (OSError(errno.EIO, "io"), "The disk fails"),
        (PermissionError(errno.EACCES, "no"), f"User {os.getuid()} needs the right to write"),
        (ComputeError("parquet: No space left on device (os error 28)"), "make room"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "for writing"),
    ],
)
def test_what_was_refused_while_a_partition_was_made_is_named(tmp_path, error, needs):
    store = Store(tmp_path, "study")
    with pytest.raises(StoreError) as found, store.draft(REF):
        raise error
    said = str(found.value)
    assert said.startswith(f"{REF} cannot be made: {store.folder(REF)}/.draft-")
    assert needs in said
    assert found.value.__cause__ is error


def test_the_path_that_the_system_names_is_the_one_that_is_told(tmp_path):
    error = OSError(errno.ENOSPC, "full", str(tmp_path / "gone" / "spill"))
    assert refusal(error, tmp_path).startswith(f"{tmp_path}/gone/spill: No space left on device. ")


def test_a_library_that_keeps_a_full_disk_to_itself_is_seen_through(tmp_path, monkeypatch):
    error = ComputeError("parquet: File out of specification: Invalid thrift: transport error")
    assert refusal(error, tmp_path) is None
    full = namedtuple("usage", "total used free")(1 << 20, (1 << 20) - 4096, 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StoreError) as found, Store(tmp_path, "study").draft(REF):
        raise error
    assert "transport error, and " in str(found.value)
    assert "No space left on device. 4096 of 1048576 bytes are free" in str(found.value)
    with pytest.raises(FileNotFoundError), Store(tmp_path, "study").draft(REF):
        raise FileNotFoundError(errno.ENOENT, "none")


@pytest.mark.parametrize(
    "error", [ValueError("other"), OSError(errno.ENOENT, "none"), RuntimeError("Permission denied")]
)
def test_what_is_no_disks_refusal_stays_what_it_is(tmp_path, error):
    assert refusal(error, tmp_path) is None
    with pytest.raises(type(error)) as found, Store(tmp_path, "study").draft(REF):
        raise error
    assert found.value is error


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"/file"):
        require_writable(tmp_path / "file")


@pytest.fixture
def databases(tmp_path, monkeypatch) -> Path:
    """Dagster's folder with its databases, some rows in each."""
    monkeypatch.setenv(environment.DAGSTER_STORAGE, str(tmp_path))
    for name in DATABASES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE runs (run_id TEXT PRIMARY KEY, body TEXT)")
            rows = [(f"run {i}", "body " * 100) for i in range(200)]
            db.executemany("INSERT INTO runs VALUES (?, ?)", rows)
        db.close()
    return tmp_path


def test_whole_databases_and_none_are_taken(databases):
    check_databases()
    for name in DATABASES:
        (databases / name).unlink()
        check_databases()


@pytest.mark.parametrize("name", DATABASES)
@pytest.mark.parametrize("damage", ["cut", "empty", "header", "page"])
def test_a_damaged_database_is_named_with_what_to_do(databases, name, damage):
    path = databases / name
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:16] = b"not a database.."
    elif damage == "page":
        content[3 * 4096 : 3 * 4096 + 64] = b"\xff" * 64
    path.write_bytes(bytes(content[: {"cut": 3 * 4096 + 100, "empty": 0}.get(damage)]))
    with pytest.raises(DatabaseDamaged, match=r"and no result\. .* move it away") as found:
        check_databases()
    assert str(found.value).startswith(f"{path} is damaged (")


def test_what_sqlite_says_under_a_librarys_error_is_told_with_the_folder(databases):
    cause = sqlite3.OperationalError("database or disk is full")
    error = sqlalchemy.exc.OperationalError("INSERT", {}, cause)
    error.__cause__ = cause
    with pytest.raises(DiskError) as found, databases_named():
        raise error
    assert f"{databases} cannot be used (database or disk is full)" in str(found.value)
    assert "bytes are free there" in str(found.value)


def test_a_database_that_is_damaged_in_the_middle_of_a_run_is_named(databases):
    path = databases / DATABASES[1]
    path.write_bytes(path.read_bytes()[:5000])
    with (
        pytest.raises(DatabaseDamaged, match=r"history/runs/index\.db is damaged"),
        databases_named(),
        closing(sqlite3.connect(path)) as db,
    ):
        db.execute("SELECT count(body) FROM runs").fetchall()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("sqlite3.OperationalError: database or disk is full", True),
        ("sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) disk I/O error", True),
        ("StoreError: sqlite3.OperationalError in a text", False),
    ],
)
def test_a_step_that_dagster_could_not_write_down_is_told_with_the_folder(databases, message, told):
    words = in_words(message)
    assert message in words
    assert (f"databases in {databases} cannot be used" in words) == told
    assert ("bytes are free there. Then run it again." in words) == told


@pytest.fixture
def postgres(databases, monkeypatch, tmp_path) -> None:
    """A home whose ``dagster.yaml`` names Postgres, and where that is: nobody listens there."""
    monkeypatch.setenv("DAGSTER_HOME", str(PROJECT / "deploy" / "postgres"))
    for name, value in zip(
        environment.POSTGRES, ("127.0.0.1", "1", "owner", "canary-9a77", "runs"), strict=True
    ):
        monkeypatch.setenv(name, value)


def test_a_postgres_that_does_not_answer_is_told_with_its_address(postgres):
    with pytest.raises(
        DatabaseUnusable, match=r"database runs at 127\.0\.0\.1:1 .*refused"
    ) as found:
        check_databases()
    assert "canary" not in str(found.value)


@pytest.mark.parametrize("home", ["postgres", "ray"])
def test_what_dagsters_settings_read_from_the_environment_must_be_said(postgres, monkeypatch, home):
    monkeypatch.setenv("DAGSTER_HOME", str(PROJECT / "deploy" / home))
    monkeypatch.setenv("PERSONA_ASSETS_RAY", "http://127.0.0.1:1")
    needed = {"ray": ("PGPASSWORD", "PERSONA_ASSETS_RAY"), "postgres": ("PGHOST", "PGDATABASE")}
    for name in needed[home]:
        monkeypatch.delenv(name)
    with pytest.raises(DatabaseUnusable, match=f"set {', '.join(needed[home])}$"):
        check_databases()


def test_what_postgres_says_under_a_librarys_error_is_told_with_its_address(postgres):
    cause = psycopg2.OperationalError("terminating connection due to administrator command")
    says = r"127\.0\.0\.1:1 .*\(terminating connection"
    with pytest.raises(DatabaseUnusable, match=says), databases_named():
        raise RuntimeError("too many retries for DB connection") from cause
    message = "sqlalchemy.exc.OperationalError: (psycopg2.OperationalError) terminating connection"
    assert "database runs at 127.0.0.1:1 cannot be used" in in_words(message)
    with pytest.raises(psycopg2.DataError), databases_named():  # our own fault, not the server's
        raise psycopg2.DataError("value too long")


def test_other_errors_pass(databases):
    with pytest.raises(KeyError), databases_named():
        raise KeyError("other")


def test_a_database_that_is_locked_is_not_called_damaged(databases, monkeypatch):
    def locked(path):
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(dagster_databases, "_damage", locked)
    with pytest.raises(DiskError, match="database is locked"):
        check_databases()
