"""What must hold of a study's data whatever was done to it, and whose processes are at it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from pathlib import Path

import duckdb

from persona_assets.freshness import Freshness
from persona_assets.hashing import sha256_file
from persona_assets.store import Ref, StoreError
from persona_assets_tests.integration.project import Project

#: Columns that tell of the run, and a number's rows that do: all else of two warehouses is equal.
_OF_A_RUN = ("run_id", "_run_id", "_seconds")
_NUMBERS_OF_A_RUN = "seconds/%"
#: Seconds that a process may take to notice that whom it works for has been killed.
_NOTICES = 30.0


def landed_files(project: Project, but: Collection[Ref] = ()) -> dict[str, str]:
    """SHA-256 of every file of the store by its path in it, less debris and the refs ``but``."""
    store = project.store
    skipped = [store.folder(ref) for ref in but]
    return {
        str(path.relative_to(store.root)): sha256_file(path)
        for path in sorted(store.root.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(store.root).parts)
        and not any(path.is_relative_to(folder) for folder in skipped)
    }


def broken(project: Project) -> str | None:
    """The first landed partition that is not whole, or one that is used without having landed."""
    graph, store = project.graph, project.store
    freshness = Freshness(graph, store)
    for ref in graph.refs:
        state = freshness.state(ref)  # first: it may land meanwhile
        try:
            manifest = store.manifest(ref)
        except StoreError as error:
            return str(error)
        if manifest is None:
            if state != "missing":
                return f"{ref} has no manifest and counts as {state}"
            continue
        for name, entry in manifest.files.items():
            path = store.folder(ref) / manifest.version / name
            if not path.is_file():
                return f"{ref} has landed without {name}"
            if (sha256_file(path), path.stat().st_size) != (entry["sha256"], entry["bytes"]):
                return f"{name} of {ref} is not what its manifest says"
    return None


def changed(before: dict[str, str], after: dict[str, str]) -> str | None:
    """The first file that is gone, other or new."""
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            what = "gone" if path not in after else "other" if path in before else "new"
            return f"{path} is {what}"
    return None


def debris(project: Project) -> str | None:
    """What a killed process has left in the store, if anything."""
    left = [p for p in project.store.root.rglob(".*") if p.name != ".run.lock"]
    return f"{left[0]} was left behind" if left else None


def other_rows(ours: Project, theirs: Project) -> str | None:
    """The first table of two warehouses whose rows differ, run ids and times aside."""
    with duckdb.connect() as db:
        for name, project in (("ours", ours), ("theirs", theirs)):
            path = project.store.path(Ref("warehouse"), "warehouse.duckdb")
            db.execute(f"ATTACH '{path}' AS {name} (READ_ONLY)")
        tables: dict[str, dict[str, list[str]]] = {"ours": {}, "theirs": {}}
        for name, table, column in db.execute(
            "SELECT c.database_name, c.table_name, c.column_name FROM duckdb_columns() c "
            "JOIN duckdb_tables() t USING (database_name, table_name) ORDER BY ALL"
        ).fetchall():
            tables[name].setdefault(table, []).append(column)
        if tables["ours"] != tables["theirs"]:
            return "the warehouses have other tables or columns"
        if not tables["ours"]:
            return "the warehouses have no tables"
        for table, columns in tables["ours"].items():
            kept = ", ".join(f'"{c}"' for c in columns if not c.endswith(_OF_A_RUN))
            where = f"WHERE number_id NOT LIKE '{_NUMBERS_OF_A_RUN}'" if table == "numbers" else ""
            rows = {name: f"SELECT {kept} FROM {name}.{table} {where}" for name in tables}
            for one, other in (("ours", "theirs"), ("theirs", "ours")):
                query = f"{rows[one]} EXCEPT ALL {rows[other]}"
                (count,) = db.execute(f"SELECT count(*) FROM ({query})").fetchone()
                if count:
                    return f"{count} rows of {table} are in {one} only"
    return None


def processes(project: Project) -> list[int]:
    """The processes that work on the project's data, by their environment."""
    sign, found = f"PERSONA_ASSETS_DATA={project.data}\0".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if sign in environment:
            found.append(int(folder.name))
    return found


def orphans(project: Project) -> str | None:
    """The processes that are still there, after the time that they may take to notice."""
    deadline = time.monotonic() + _NOTICES
    while pids := processes(project):
        if time.monotonic() > deadline:
            return f"still there after {_NOTICES:g} s: {[_command(pid) for pid in pids]}"
        time.sleep(0.1)
    return None


def children(pid: int) -> list[int]:
    """A process's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(folder.name))
    return found


def worked(pid: int) -> float:
    """The seconds that a process has had a processor; without end if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return str(pid)


def running(pid: int, command: str) -> bool:
    """Whether a process of whose command line ``command`` is a part is there, and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX" and command in _command(pid)
