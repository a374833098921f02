"""Backfills of cells on a database and a cluster that fail in the middle: what is to hold of them.

The cells are real ones of the tiny study: trained, evaluated, diagnosed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch
from urllib.error import HTTPError

import dagster as dg

from persona_assets.asset_table import JOBS
from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.webserver import Webserver, backfilled
from persona_assets_tests.reliability import whole

CHAIN = JOBS["cell"].assets
#: Personas × scaffolds × questions of the tiny study.
_ROWS = 11 * 4 * 24


def widened(project: Project, folder: Path, seeds: Sequence[int]) -> Project:
    """A copy of a finished project whose study has more seeds: their trained cells can be made."""
    copy = project.copy(folder)
    path = copy.data / "studies" / f"{copy.name}.yaml"
    text = path.read_text("utf-8")
    assert "seeds: [42]" in text
    path.write_text(text.replace("seeds: [42]", f"seeds: {list(seeds)}"), "utf-8")
    return copy


def trained(project: Project, count: int) -> list[str]:
    """The keys of so many trained cells."""
    keys = [cell.key for cell in project.study.cells_of("trained")][:count]
    assert len(keys) == count
    return keys


def unmake(project: Project, keys: Sequence[str]) -> None:
    """Take away what there is of these cells."""
    for ref in (Ref(asset, key) for asset in CHAIN for key in keys):
        shutil.rmtree(project.store.folder(ref), ignore_errors=True)


def landed(project: Project, keys: Sequence[str]) -> int:
    """How many partitions of these cells have landed."""
    refs = [Ref(asset, key) for asset in CHAIN for key in keys]
    return sum(project.store.manifest(ref) is not None for ref in refs)


def status(server: Webserver, backfill: str) -> str:
    """The state of a backfill, asked for again where the webserver has only found that a connection
    of its own was cut off: it keeps some open, and fails one request with each.
    """
    for _ in range(10):
        with suppress(HTTPError):
            return backfilled(server, backfill)["status"]
    raise AssertionError("the webserver does not come to")


def wait(what: Callable[[], bool], seconds: float) -> None:
    """Look every second until ``what`` holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not after {seconds:g} s"
        time.sleep(1)


@contextmanager
def instance(project: Project, **variables: str) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance as the project's webserver has it, with what more is set for that."""
    home = {"DAGSTER_HOME": str(project.data)}
    with (
        patch.dict(os.environ, project.environment | home | variables),
        dg.DagsterInstance.get() as found,
    ):
        yield found


def problems(project: Project, found: dg.DagsterInstance, keys: Sequence[str]) -> list[str]:
    """What of these cells is lost, half there, made twice or told twice."""
    states = project.states()
    wrong = [whole.broken(project)]  # debris below: a sensor's runs are at work on what follows
    for ref in (Ref(asset, key) for key in keys for asset in CHAIN):
        if states[ref] != "fresh":
            wrong.append(f"{ref} is {states[ref]}")
            continue
        manifest = project.store.landed(ref)
        folder = project.store.folder(ref)
        if versions := {p.name for p in folder.iterdir()} - {"manifest.json", manifest.version}:
            wrong.append(f"{ref} has {versions} beside what landed")
        wanted = dg.AssetRecordsFilter(
            dg.AssetKey([project.name, ref.asset]), asset_partitions=[ref.key]
        )
        records = found.fetch_materializations(wanted, limit=100).records
        # A run that was started again tells once more of what the lost one had landed, and kept.
        made = {}
        for record in records:
            said = record.asset_materialization.metadata
            if said["data_version"].value != manifest.data_version:
                wrong.append(f"{ref}: run {record.run_id} tells of another version")
            made.setdefault(said["made_by"].value, []).append(record.run_id)
        if list(made) != [manifest.provenance.run_id]:
            wrong.append(f"{ref} was made by {list(made)}, {manifest.provenance.run_id} landed")
        if any(runs.count(run) > 1 for runs in made.values() for run in runs):
            wrong.append(f"{ref} is told of twice by a run: {made}")
    for key in keys:
        if states[Ref("cell_outcomes", key)] == "fresh":
            rows = project.store.frame(Ref("cell_outcomes", key))
            distinct = rows.n_unique(["persona", "scaffold", "question_id"])
            if (rows.height, distinct) != (_ROWS, _ROWS):
                wrong.append(f"{key} has {rows.height} outcomes, {distinct} of them distinct")
    return [text for text in wrong if text]


def others(project: Project, undisturbed: Project, keys: Sequence[str]) -> list[str]:
    """The partitions that came out otherwise than an undisturbed project's, if it has them."""
    refs = [Ref(asset, key) for asset in CHAIN for key in keys]
    return [
        str(ref)
        for ref in refs
        if (before := undisturbed.store.manifest(ref))
        and before.data_version != project.store.landed(ref).data_version
    ]
