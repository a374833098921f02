"""What the environment keeps secret is nowhere in what a real run makes, says or fails with."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import duckdb
import polars as pl

from persona_assets.store import Ref
from persona_assets_tests.integration.conftest import CANARIES

CELL = "librarian.garbage_cot.42"


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and those that its format packs or spreads over pages."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield json.dumps(pl.read_parquet(path).to_dicts(), default=str).encode()
    if path.suffix == ".duckdb":
        with duckdb.connect(str(path), read_only=True) as db:
            for (table,) in db.execute(
                "SELECT view_name FROM duckdb_views() WHERE NOT internal "
                "UNION ALL SELECT table_name FROM duckdb_tables()"
            ).fetchall():
                yield repr(db.execute(f'FROM "{table}"').fetchall()).encode()
    if path.suffix == ".db":
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            yield "\n".join(db.iterdump()).encode()


def leaks(folder: Path) -> list[tuple[str, str]]:
    """Which secret is in which file, plain, in base64 or as in a URL."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        kept = b"\n".join(contents(path))
        for name, secret in CANARIES.items():
            forms = (secret, quote(secret), base64.b64encode(secret.encode()).decode())
            if any(form.encode() in kept for form in forms):
                found.append((path.name, name))
    return found


def test_no_secret_is_in_anything_that_a_run_made(project):
    assert {path.suffix for path in project.data.rglob("*")} >= {
        *(".parquet", ".duckdb", ".db", ".json", ".html", ".md", ".svg", ".log", ".safetensors"),
    }
    assert leaks(project.data) == []


def test_no_secret_is_in_what_a_failure_leaves(own_project):
    """A partition's folder that cannot be written, within a Dagster run."""
    folder = own_project.store.folder(Ref("cell_diagnostics", CELL))
    shutil.rmtree(folder)
    folder.write_text("a file where a folder is to be")
    done = own_project.run("run", "--study", "tiny", "--cells", CELL, **CANARIES)
    assert done.returncode == 1
    assert f"failed: {CELL}" in done.stderr
    (own_project.data / "failure.log").write_text(done.stdout + done.stderr, "utf-8")
    assert leaks(own_project.data) == []


def test_a_secret_would_be_found(tmp_path):
    secret = CANARIES["HF_TOKEN"]
    pl.DataFrame({"text": [f"with {secret}"] * 99}).write_parquet(tmp_path / "rows.parquet")
    with duckdb.connect(str(tmp_path / "w.duckdb")) as db:
        db.execute("CREATE TABLE t AS SELECT $s || i AS x FROM range(9999) r(i)", {"s": secret})
    with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        db.execute("CREATE TABLE t (x)")
        db.execute("INSERT INTO t VALUES (?)", ("." * 5000 + secret + "." * 5000,))
        db.commit()
    (tmp_path / "url.log").write_text(base64.b64encode(secret.encode()).decode())
    (tmp_path / "clean.json").write_text("{}")
    names = ["rows.parquet", "runs.db", "url.log", "w.duckdb"]
    assert leaks(tmp_path) == [(name, "HF_TOKEN") for name in names]
