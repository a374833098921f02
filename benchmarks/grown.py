"""A finished study, grown to any number of cells: manifests and events, with nothing computed.

Each new cell is a copy of a finished one's: its manifests, made from the inputs of its own, its
files by hard links, and the rows that its Dagster runs left, under run ids, keys and versions of
their own. So a cell leaves as many files, rows and bytes as a real one did.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy
import yaml
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    AssetKeyTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable, SnapshotsTable

from persona_assets.asset_table import JOBS
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.hashing import sha256_json
from persona_assets.manifest import Manifest, Ref
from persona_assets.store import MANIFEST, Store
from persona_assets.study import Study, load_study

MINI = Path(__file__).parents[1] / "data" / "studies" / "mini.yaml"

_Rows = dict[sqlalchemy.Table, list[dict[str, Any]]]
#: Events that are inserted at once.
_BATCH = 2000


@dataclass(frozen=True, slots=True)
class Made:
    """A Dagster run of a grown study, and the finished run that it is a copy of.

    Attributes:
        refs: What it made, where that has a key: else it is the finished run itself.
    """

    run_id: str
    key: str | None
    refs: tuple[Ref, ...]
    copy_of: str


class Model:
    """A finished study of the mini study's arms, and what it left in Dagster's SQLite.

    Args:
        data: The data folder of a `persona-assets run`.
    """

    def __init__(self, data: Path, name: str):
        self.study = load_study(data / "studies" / f"{name}.yaml")
        self.store = Store(data / "store", name)
        self.history = data / "dagster" / "history"
        self._manifests: dict[Ref, Manifest] = {}

    def key(self, key: str) -> str:
        """The model's key that stands for a grown study's: of its own sources and seed."""
        source, _, rest = key.partition(".")
        arm, _, seed = rest.partition(".")
        if arm not in self.study.arms:  # a contrast's
            return key
        own = source if f"{source}.{arm}" in self.study.conditions else self.study.sources[-1]
        return f"{own}.{arm}.{self.study.seeds[0]}" if seed else f"{own}.{arm}"

    def manifest(self, ref: Ref) -> Manifest:
        """The manifest that stands for a grown study's partition."""
        own = Ref(ref.asset, ref.key and self.key(ref.key))
        if own not in self._manifests:
            self._manifests[own] = self.store.landed(own)
        return self._manifests[own]

    def rows(self, file: str, query: Any) -> list[dict[str, Any]]:
        """What a query finds in a database of Dagster's history."""
        engine = sqlalchemy.create_engine(f"sqlite:///{self.history / file}")
        with engine.connect() as db:
            return [dict(row) for row in db.execute(query).mappings()]

    def runs(self, job: str, key: str | None) -> list[str]:
        """The ids of the runs that made a job, for one key."""
        columns = RunsTable.c
        query = sqlalchemy.select(columns.run_id).where(
            columns.pipeline_name == job, columns.partition == key, columns.status == "SUCCESS"
        )
        return [row["run_id"] for row in self.rows("runs.db", query.order_by(columns.id))]


def study_text(model: Study, cells: int) -> str:
    """The mini study with the seeds for about ``cells`` cells, under the model's name."""
    raw = yaml.safe_load(MINI.read_text("utf-8"))
    conditions = sum(len(arm.get("sources", raw["sources"])) for arm in raw["arms"].values())
    seeds = list(range(1, 1 + max(1, round(cells / conditions))))
    raw["questions"]["n_eval"] = model.questions.n_eval
    raw.pop("publish", None)  # which is no part of a run
    return yaml.safe_dump(raw | {"name": model.name, "seeds": seeds}, sort_keys=False)


def grow(model: Model, data: Path, cells: int) -> Study:
    """Write study file and store of about ``cells`` cells into ``data``, all of it up to date."""
    file = data / "studies" / f"{model.study.name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(study_text(model.study, cells), "utf-8")
    study = load_study(file)
    graph = Graph(study)
    made_by = {ref: run.run_id for run in runs(model, graph) for ref in run.refs}
    freshness = Freshness(graph, Store(data / "store", study.name))
    for ref in graph.refs:
        _lay(model, freshness, ref, made_by.get(ref))
    return study


def runs(model: Model, graph: Graph) -> Iterator[Made]:
    """The runs that made the grown study."""
    for job, its in JOBS.items():
        assets = [graph.assets[name] for name in its.assets if name in graph.assets]
        if not assets:
            continue
        if assets[0].keys is None:
            yield from (Made(run_id, None, (), run_id) for run_id in model.runs(job, None))
        copies: dict[str, str] = {}
        for key in assets[0].keys or ():
            if (old := model.key(key)) not in copies:
                (copies[old],) = model.runs(job, old)
            run_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{job}/{key}"))
            refs = tuple(Ref(asset.name, key) for asset in assets)
            yield Made(run_id, key, refs, copies[old])


def _lay(model: Model, freshness: Freshness, ref: Ref, run_id: str | None) -> None:
    """Land a partition with the model's files, from inputs of its own."""
    old, folder = model.manifest(ref), freshness.store.folder(ref)
    for name in old.files:
        target = folder / old.version / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(model.store.files_at(old) / name, target)
    manifest = replace(
        old,
        ref=ref,
        data_version=_version(old, ref),
        provenance=replace(
            old.provenance,
            run_id=run_id or old.provenance.run_id,
            inputs=freshness.inputs(ref),
        ),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")


def _version(old: Manifest, ref: Ref) -> str:
    """The data version of a copy: one of its own where it has a key."""
    return sha256_json([old.data_version, str(ref)]) if ref.key else old.data_version


def record(model: Model, study: Study, instance: Any, *, every_event: bool) -> None:
    """Write the runs of a grown study into an instance's empty storage.

    Args:
        every_event: Whether the event log holds every event, as Postgres's does. SQLite's holds
            those of assets, checks and runs; all of a run's are in a file of the run's own.
    """
    copies = _Copies(model, every_event)
    waiting: _Rows = {AssetKeyTable: copies.asset_keys(), SnapshotsTable: copies.snapshots()}
    of_runs = {RunsTable, RunTagsTable, SnapshotsTable}
    storage = instance.run_storage, instance.event_log_storage
    with storage[0].connect() as in_runs, storage[1].index_connection() as in_events:

        def insert() -> None:
            for table, rows in waiting.items():
                if rows:
                    db = in_runs if table in of_runs else in_events
                    db.execute(table.insert(), rows)
                    waiting[table] = []

        insert()
        for run in runs(model, Graph(study)):
            for table, rows in copies.of(run).items():
                waiting.setdefault(table, []).extend(rows)
            if len(waiting[SqlEventLogStorageTable]) > _BATCH:
                insert()
        insert()


class _Copies:
    """The rows that finished runs left, for other runs to have as well."""

    def __init__(self, model: Model, every_event: bool):
        self.model, self.every_event = model, every_event
        self.left: dict[str, _Rows] = {}
        self.events = 0

    def asset_keys(self) -> list[dict[str, Any]]:
        """A row an asset, less what the web interface notes there for the next time it is asked."""
        found = self.model.rows("runs/index.db", sqlalchemy.select(AssetKeyTable))
        return [row | {"cached_status_data": None} for row in found]

    def snapshots(self) -> list[dict[str, Any]]:
        return self.model.rows("runs.db", sqlalchemy.select(SnapshotsTable))

    def of(self, run: Made) -> _Rows:
        """A run's rows, with numbers, key and versions of its own."""
        if run.copy_of not in self.left:
            self.left[run.copy_of] = self._left_by(run.copy_of)
        words = {run.copy_of: run.run_id}
        if run.key:
            words[self.model.key(run.key)] = run.key
        for ref in run.refs:
            old = self.model.manifest(ref)
            words[old.data_version] = _version(old, ref)
        before = self.events

        def own(value: Any, column: str) -> Any:
            if column in _NUMBERS and value is not None:
                return value + before
            if isinstance(value, str):
                for old, new in words.items():
                    value = value.replace(old, new)
            return value

        left = self.left[run.copy_of]
        self.events += len(left[SqlEventLogStorageTable])
        return {
            table: [{column: own(value, column) for column, value in row.items()} for row in rows]
            for table, rows in left.items()
        }

    def _left_by(self, run_id: str) -> _Rows:
        """Its rows; events are numbered from 1, and other rows have no number but theirs."""

        def rows(file: str, table: sqlalchemy.Table) -> list[dict[str, Any]]:
            query = sqlalchemy.select(table).where(table.c.run_id == run_id).order_by(table.c.id)
            return self.model.rows(file, query)

        events = rows("runs/index.db", SqlEventLogStorageTable)
        numbers = {event["event"]: event["id"] for event in events}
        tags = sqlalchemy.select(AssetEventTagsTable).where(
            AssetEventTagsTable.c.event_id.in_(numbers.values())
        )
        found: _Rows = {
            RunsTable: rows("runs.db", RunsTable),
            RunTagsTable: rows("runs.db", RunTagsTable),
            AssetEventTagsTable: self.model.rows("runs/index.db", tags),
            AssetCheckExecutionsTable: rows("runs/index.db", AssetCheckExecutionsTable),
        }
        if self.every_event:
            events = rows(f"runs/{run_id}.db", SqlEventLogStorageTable)
        new = {numbers.get(event["event"]): i for i, event in enumerate(events, 1)}
        for table in found:
            for row in found[table]:
                del row["id"]
                for column in _NUMBERS & row.keys():
                    row[column] = new.get(row[column])
        events = [event | {"id": i} for i, event in enumerate(events, 1)]
        return found | {SqlEventLogStorageTable: events}


#: Columns with the number of an event.
_NUMBERS = {"id", "event_id", "evaluation_event_storage_id", "materialization_event_storage_id"}
