"""A complete tiny study in this process: partitions are taken away, made by real runs, compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from persona_assets import environment
from persona_assets.asset_table import JOBS
from persona_assets.dagster_databases import DatabaseDamaged, databases_named
from persona_assets.disk import DiskError
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.records import unrecorded
from persona_assets.run_plan import Unit
from persona_assets.run_worker import Outcome, attempt
from persona_assets.store import Manifest, Ref, Store
from persona_assets.study import Study, load_study
from persona_assets_tests.integration.project import Project
from persona_assets_tests.reliability.content import content_of

_JOB = {asset: name for name, job in JOBS.items() for asset in job.assets}


@dataclass(frozen=True)
class Bench:
    """The study of a project, whose data folder this process works in."""

    project: Project

    @cached_property
    def study(self) -> Study:
        return load_study(environment.study_file("tiny"))

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.study)

    @cached_property
    def store(self) -> Store:
        return Store(environment.store_dir(), "tiny")

    @cached_property
    def _definitions(self):
        from persona_assets.definitions import study_definitions

        return study_definitions(self.study)

    def make(self, ref: Ref) -> Outcome:
        """Make a partition as a worker of ``persona-assets run`` does, by a Dagster run."""
        import dagster as dg

        unit = Unit(_JOB[ref.asset], ref.key, (ref,))
        try:
            with databases_named(), dg.DagsterInstance.get() as instance:
                return attempt(unit, self._definitions, self.graph, self.store, instance)
        except (DatabaseDamaged, DiskError) as error:
            return Outcome("failed", error=str(error))

    def is_recorded(self, ref: Ref) -> bool:
        """Whether Dagster's latest record of a partition is of what has landed."""
        import dagster as dg

        with dg.DagsterInstance.get() as instance:
            return not unrecorded(Freshness(self.graph, self.store), instance, [ref])

    def remove(self, *refs: Ref) -> None:
        """Let partitions not have landed."""
        for ref in refs:
            shutil.rmtree(self.store.folder(ref))

    @property
    def dagster(self) -> Path:
        """The folder of Dagster's databases."""
        return Path(os.environ[environment.DAGSTER_STORAGE])

    def landed(self) -> dict[str, Manifest]:
        """The manifest of each partition that has landed whole, by ``str(Ref)``."""
        return {
            str(ref): self.store.landed(ref)
            for ref in self.graph.refs
            if self.store.manifest(ref) and not self.store.verify(ref)
        }

    def content(self, ref: Ref) -> object:
        """What a partition says, ids and durations of runs aside; equal if it says the same."""
        manifest = self.store.landed(ref)
        if ref.asset in ("warehouse", "number_ledger", "report"):  # they tell of runs, and of time
            return {name: content_of(self.store.path(ref, name)) for name in manifest.files}
        return manifest.data_version


@contextmanager
def bench(data: Path, dagster: Path | None = None) -> Iterator[Bench]:
    """Work in a data folder, with Dagster's databases in it or elsewhere."""
    project = Project(data)
    before = dict(os.environ)
    os.environ |= project.environment | {"PERSONA_ASSETS_DAGSTER": str(dagster or data / "dagster")}
    try:
        environment.prepare()
        yield Bench(project)
    finally:
        os.environ.clear()
        os.environ |= before


def lost(
    before: Mapping[str, Manifest], after: Mapping[str, Manifest], but: Collection[Ref] = ()
) -> str | None:
    """What had landed and is gone, damaged or other now, in words; None if nothing is."""
    spared = {str(ref) for ref in but}
    found = [ref for ref in before if ref not in spared and after.get(ref) != before[ref]]
    return f"no longer as landed: {', '.join(found)}" if found else None
