"""Makes a study twice from scratch, in two folders, and compares all that landed.

Run ids and times aside, everything has to be equal: adapters, outcomes, estimates and report.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import duckdb
import polars as pl

from persona_assets.store import Ref
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project
from persona_assets_tests.reliability.table import Row

#: What each row of the table compares.
KINDS = {
    "adapters": ("prior_checkpoint", "checkpoint"),
    "outcomes": (
        *("baseline_outcomes", "cell_outcomes", "prior_accuracies", "cell_diagnostics"),
        "forced_rationales",
    ),
    "estimates": (
        *("contrast_estimate", "multiplicity", "loss_matrix", "exploratory_estimates"),
        *("vocabulary_leakage", "number_ledger", "warehouse"),
    ),
    "report": ("forest_plot", "loss_heatmap", "report"),
    "inputs": ("tokenizer", "question_bank", "base_model", "rationales", "training_dataset"),
}
#: How many processes share the work, in turn: what runs beside and before a cell changes nothing.
_WORKERS = (2, 3)

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


def rows(folder: Path, seed: int) -> list[Row]:
    """The mini study, twice; its own seeds decide what is made, ``seed`` nothing."""
    made = []
    for i, workers in enumerate(_WORKERS):
        project = Project(folder / str(i), "mini")
        (project.data / "studies").mkdir(parents=True)
        shutil.copy(PROJECT / "data" / "studies" / "mini.yaml", project.data / "studies")
        done = project.run("run", "--study", "mini", "--workers", str(workers), timeout=7200)
        if done.returncode:
            raise RuntimeError(f"the study was not made:\n{done.stdout[-4000:]}{done.stderr}")
        made.append(project)
    return compared(*made)


def compared(ours: Project, theirs: Project) -> list[Row]:
    """A row a kind: partitions that both projects were to have landed, and those that differ."""
    found = {
        kind: Row(
            f"the study made again from scratch: {kind}",
            recovered_by="nothing to recover: equal to the last bit, run ids and times aside",
        )
        for kind in KINDS
    }
    kinds = {asset: kind for kind, assets in KINDS.items() for asset in assets}
    for ref in ours.graph.refs:
        found[kinds[ref.asset]].count(difference(ours, theirs, ref))
    return list(found.values())


def difference(ours: Project, theirs: Project, ref: Ref) -> str | None:
    """In which file a partition differs between two projects, and how; None if it does not."""
    mine, yours = (project.store.manifest(ref) for project in (ours, theirs))
    if mine is None or yours is None:
        return f"{ref} has not landed twice"
    if mine.files.keys() != yours.files.keys():
        return f"{ref} has the files {sorted(mine.files)} and {sorted(yours.files)}"
    for name in mine.files:
        a, b = (content(project.store.path(ref, name)) for project in (ours, theirs))
        if a != b:
            parts = [part for part in a.keys() | b.keys() if a.get(part) != b.get(part)]
            return f"{ref}: {name} differs in {', '.join(sorted(parts))}"
    return None


def content(path: Path) -> dict[str, str]:
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
