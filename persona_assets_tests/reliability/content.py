"""What a landed file says, ids and times of runs aside: equal for files that say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import duckdb
import polars as pl

#: Columns that tell which run made a row, and how long it took.
_ASIDE = re.compile(r"(.*_)?(run_id|seconds)")
_UUID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Times on the clock: of a training log; of the report, whose HTML names each and whose Markdown
#: has them in four lines.
_TIMES = re.compile(
    rb'("(?:wall|cpu)_seconds": )[\d.e-]+'
    rb'|(data-(?:number="seconds/\w+" data-field="value"|column="\w+_seconds")[^>]*>)[^<]*'
    rb"|(^- (?:graphics processor|processor-hours|of both, by stage|besides)\b).*$",
    re.MULTILINE,
)


def content_of(path: Path) -> dict[str, str]:
    """SHA-256 of what is in a file, by table and column where it has any, less runs and times."""
    if path.suffix == ".parquet":
        return dict(_columns(path.stem, pl.read_parquet(path).to_dict(as_series=False)))
    if path.suffix == ".duckdb":
        found: dict[str, str] = {}
        with duckdb.connect(str(path), read_only=True) as db:
            for (table,) in db.execute("SELECT table_name FROM duckdb_tables()").fetchall():
                read = db.execute(f'FROM "{table}"')
                names, values = [column[0] for column in read.description], read.fetchall()
                columns = zip(*values, strict=True) if values else ([] for _ in names)
                found |= _columns(table, dict(zip(names, map(list, columns), strict=True)))
        return found
    data = path.read_bytes()
    if path.suffix in (".html", ".md") or path.name == "training_log.json":
        data = _TIMES.sub(rb"\1\2\3", _UUID.sub(b"", data))
    return {"its bytes": sha256(data).hexdigest()}


def _columns(table: str, columns: dict[str, list]) -> Iterator[tuple[str, str]]:
    """The columns' hashes, values in rows' order; numbers that are times are left out."""
    ids = columns.get("number_id")
    kept = [i for i, name in enumerate(ids) if not name.startswith("seconds/")] if ids else None
    for name, values in columns.items():
        if not _ASIDE.fullmatch(name):
            values = values if kept is None else [values[i] for i in kept]
            yield f"{table}.{name}", sha256(repr(values).encode("utf-8", "replace")).hexdigest()
